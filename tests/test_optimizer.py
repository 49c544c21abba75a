"""Updates of one trained network: sound ones, and gradients that are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training.config.train_config import PRESETS, load_config
from training.run.optimizer import Part, make_part


@pytest.fixture
def part() -> Part:
    paths = {name: Path(name) for name in ("data", "base", "output")}
    config = load_config(PRESETS / "smoke.yaml", ["learning_rate=0.1", "weight_decay=0"], **paths)
    named = {
        "unet.lora": nn.Parameter(torch.ones(2)),
        "encoder.encoder.mid.block_1.time_emb_proj.bias": nn.Parameter(torch.ones(2)),
    }
    return make_part("student", named, config.learning_rate, config, "cpu")


def give_gradients(part: Part, value: float) -> None:
    for parameter in part.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def test_time_layers_have_a_learning_rate_of_their_own(part: Part) -> None:
    give_gradients(part, 5.0)
    assert part.update(True, 1.0)
    adapter, time = part.parameters.values()
    assert adapter.tolist() == pytest.approx([0.9, 0.9])  # Adam's first step is the learning rate
    assert time.tolist() == pytest.approx([1 - 1e-6] * 2, abs=1e-7)
    assert adapter.grad is None


@pytest.mark.parametrize(("losses_are_finite", "gradient"), [(False, 1.0), (True, float("nan")), (True, float("inf"))])
def test_a_step_that_is_not_finite_changes_nothing(part: Part, losses_are_finite: bool, gradient: float) -> None:
    give_gradients(part, gradient)
    assert not part.update(losses_are_finite, 1.0)
    assert all(parameter.tolist() == [1, 1] and parameter.grad is None for parameter in part.parameters.values())
    assert not part.optimizer.state


def test_a_loss_that_is_no_number_is_left_out_in_half_precision_too(part: Part) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    half = Part(part.name, part.parameters, part.optimizer, scaler)
    scaler.scale(torch.ones(1))  # makes the scale
    give_gradients(half, 1.0)
    assert not half.update(False, 1.0) and all(p.tolist() == [1, 1] for p in half.parameters.values())
    give_gradients(half, 1.0)
    assert half.update(True, 1.0), "the scaler is not ready for the next step"


def test_gradients_that_overflow_in_half_precision_only_lower_the_scale(part: Part) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    half = Part(part.name, part.parameters, part.optimizer, scaler)
    seen = []
    for _ in range(3):
        scaler.scale(torch.ones(1))  # makes the scale
        give_gradients(half, float("inf"))
        seen.append((half.update(True, 1.0), scaler.get_scale()))
    assert seen == [(True, 2.0), (True, 1.0), (False, 0.5)], "below a scale of 1 overflow is a fault"
    assert all(parameter.tolist() == [1, 1] for parameter in half.parameters.values())
