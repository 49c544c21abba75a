"""The student's loss: a weighted sum of its parts, in its value and in its gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import build, few_steps, trainer

from training.objective.objective import MicroBatch, Objective, StudentLoss
from training.run.build import Run

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = {"mse_weight": 3.0, "lpips_weight": 0.25, "distillation_weight": 0.5, "adversarial_weight": 2.0}
PARTS = {weight: weight.removesuffix("_weight") for weight in WEIGHTS}


@pytest.fixture(scope="module")
def prepared(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, MicroBatch]:
    """A run with every part of the loss, and a micro batch of it."""
    config = few_steps(inputs, tmp_path_factory.mktemp("run"), **WEIGHTS)
    run = build(config)
    (batch,) = next(trainer(config, run).steps())
    return run, run.micro_batch(batch, torch.device("cpu"))


def student_loss(prepared: tuple[Run, MicroBatch], **settings: object) -> StudentLoss:
    run, batch = prepared
    assert run.teacher is not None and run.discriminator is not None
    settings = replace(run.objective.settings, **settings)  # type: ignore[arg-type]
    objective = Objective(settings, run.objective.perceptual, run.objective.downscale)  # type: ignore[arg-type]
    return objective.student(run.student.module, batch, run.teacher.module, run.discriminator.module)


def test_the_loss_is_the_weighted_sum_of_its_parts(prepared: tuple[Run, MicroBatch]) -> None:
    done = student_loss(prepared)
    assert set(done.parts) == set(PARTS.values()) and all(part != 0 for part in done.parts.values())
    expected = sum(weight * done.parts[PARTS[name]].item() for name, weight in WEIGHTS.items())
    assert done.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_multiplies_its_part_and_its_gradient(prepared: tuple[Run, MicroBatch], name: str) -> None:
    student = prepared[0].student.module
    only = dict.fromkeys(WEIGHTS, 0.0)
    if name != "adversarial_weight":  # its discriminator is there for all, or features are not asked for
        only["adversarial_weight"] = 1e-12
    gradients = []
    for weight in (1.0, 4.0):
        done = student_loss(prepared, **only | {name: weight})
        assert done.loss.item() == pytest.approx(weight * done.parts[PARTS[name]].item(), rel=1e-5)
        student.zero_grad()
        done.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.trainable().values() if p.grad is not None]))
    student.zero_grad()
    assert gradients[0].norm() > 0
    # Up to rounding: the sums are the same, but of numbers four times larger.
    torch.testing.assert_close(gradients[1], 4 * gradients[0], rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())
