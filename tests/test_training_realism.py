"""The discriminator beside the distillation: what it teaches, and that a run with it is as sound as one without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_learner import equal
from training_runs import (
    LOSSES,
    assert_same_losses,
    few_steps,
    final_tensors,
    log_of,
    make_inputs,
    train_in_two_processes,
    trainer,
)

from tadsr.schedule import MAX_TIMESTEP
from training.discriminator import Discriminator, realism_loss
from training.lpips import LPIPS
from training.settings import ConfigError
from training.step import student_loss
from training.timesteps import student_timesteps

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (*LOSSES, "realism", "judge")
WITH_REALISM = {"realism_weight": 0.5}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, lpips_network: Callable[[str], LPIPS]) -> dict[str, Path]:
    lpips_network("vgg")  # runs load their own
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in one go."""
    output = tmp_path_factory.mktemp("whole")
    trainer(few_steps(inputs, output, **WITH_REALISM)).train()
    return output


def test_the_discriminator_is_trained_and_saved(inputs: dict[str, Path], whole: Path) -> None:
    start = trainer(few_steps(inputs, whole, **WITH_REALISM)).run.discriminator.named_parameters()
    end = final_tensors(whole)
    still = [name for name, before in start if torch.equal(before, end[f"judge.{name}"])]
    assert not still, f"not trained: {still}"


def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=1, **WITH_REALISM)).train()
    second = trainer(few_steps(inputs, tmp_path, **WITH_REALISM))
    assert second.resume()
    second.train()
    assert equal(final_tensors(whole), final_tensors(tmp_path)), "something that decides the run is not saved"


def test_micro_batches_and_checkpointing_change_nothing(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, micro_batch=1, gradient_checkpointing=True, **WITH_REALISM)).train()
    assert_same_losses(log_of(whole), log_of(tmp_path), NAMES)


def test_two_processes_give_the_losses_of_one(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path / "one", batch=4, micro_batch=4, **WITH_REALISM)).train()
    train_in_two_processes(inputs, tmp_path / "two", batch=4, **WITH_REALISM)
    assert_same_losses(log_of(tmp_path / "one"), log_of(tmp_path / "two"), NAMES)


def test_it_can_join_a_run_that_began_without_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=1)).train()
    joined = trainer(few_steps(inputs, tmp_path, **WITH_REALISM))
    with pytest.raises(ConfigError, match="realism_weight"):
        joined.resume()
    assert joined.resume(allow_config_change=True)
    joined.train()
    first, *later = log_of(tmp_path)
    assert "judge" not in first and all("judge" in record for record in later)


def test_it_counts_in_proportion_to_the_timestep(inputs: dict[str, Path], tmp_path: Path) -> None:
    prepared = trainer(few_steps(inputs, tmp_path, batch=4, micro_batch=4, **WITH_REALISM))
    (batch,) = next(prepared.steps())
    micro = prepared.run.micro_batch(batch, torch.device("cpu"))
    done = student_loss(prepared.config, prepared.networks, micro, prepared.run.student.downscale)
    assert done.judged is not None
    timesteps = student_timesteps(prepared.config, micro.indices)
    assert len(set(timesteps.tolist())) > 1
    torch.testing.assert_close(done.judged.weight, timesteps / MAX_TIMESTEP)
    each = realism_loss(prepared.run.discriminator(done.judged.ours))
    assert done.parts["realism"] == pytest.approx((timesteps / MAX_TIMESTEP * each).mean().item(), rel=1e-5)


def test_what_it_says_to_the_student_does_not_train_it() -> None:
    torch.manual_seed(0)
    judge = Discriminator()
    features = [torch.randn(2, channels, 8, 8, requires_grad=True) for channels in (64, 128, 256, 512, 512)]
    realism_loss(judge.verdicts(features)).sum().backward()
    assert all(parameter.grad is None for parameter in judge.parameters())
    judged = features[1].grad
    assert judged is not None and judged.abs().max() > 0
    verdicts = zip(judge(features), judge.verdicts(features), strict=True)
    assert all(torch.equal(a, b) for a, b in verdicts)


def test_crops_too_small_for_it_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop is 24; accepted with realism_weight: from 28"):
        few_steps(inputs, tmp_path, crop=24, lpips_shift=4, **WITH_REALISM)
