"""The discriminator beside the distillation: what it teaches, and that a run with it is as sound as one without."""

from __future__ import annotations

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
    train_in_two_processes,
    trainer,
)

from tadsr.schedule import MAX_TIMESTEP
from training.config.parsing import ConfigError
from training.networks.discriminator import hinge_loss, realism_loss
from training.objective.objective import judge_loss, student_loss
from training.objective.timesteps import student_timesteps

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (*LOSSES, "realism", "judge")
WITH_REALISM = {"realism_weight": 0.5}


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
    losses, gradients = [], []
    for weight in (0.0, 0.5):
        prepared = trainer(few_steps(inputs, tmp_path, batch=4, micro_batch=4, realism_weight=weight))
        (batch,) = next(prepared.steps())
        micro = prepared.run.micro_batch(batch, torch.device("cpu"))
        done = student_loss(prepared.config, prepared.networks, micro, prepared.run.student.downscale)
        done.loss.backward()
        losses.append(done.loss.item())
        gradients.append({name: p.grad for name, p in prepared.run.student.trainable().items()})
    assert done.judged is not None
    timesteps = student_timesteps(prepared.config, micro.indices)
    assert len(set(timesteps.tolist())) > 1
    torch.testing.assert_close(done.judged.weight, timesteps / MAX_TIMESTEP)
    judge = prepared.run.discriminator
    expected = (timesteps / MAX_TIMESTEP * realism_loss(judge(done.judged.ours))).mean().item()
    assert done.parts["realism"] == pytest.approx(expected, rel=1e-5)
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-3), "the student is not told"
    assert all(parameter.grad is None for parameter in judge.parameters()), "the student's loss trains the judge"
    without, with_realism = gradients
    changed = [name for name, g in without.items() if g is not None and not torch.equal(g, with_realism[name])]
    assert changed, "no gradient of the student changes"

    own = hinge_loss(judge(done.judged.real), judge(done.judged.ours))
    assert not torch.allclose(own, hinge_loss(judge(done.judged.ours), judge(done.judged.real)))
    torch.testing.assert_close(judge_loss(prepared.networks, done.judged), (timesteps / MAX_TIMESTEP * own).mean())


def test_crops_too_small_for_it_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop is 24; accepted with realism_weight: from 32"):
        few_steps(inputs, tmp_path, crop=24, lpips_shift=4, **WITH_REALISM)
