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
from training.networks.discriminator import discriminator_loss, generator_loss

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (*LOSSES, "adversarial", "discriminator")
WITH_DISCRIMINATOR = {"adversarial_weight": 0.5}


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in one go."""
    output = tmp_path_factory.mktemp("whole")
    trainer(few_steps(inputs, output, **WITH_DISCRIMINATOR)).train()
    return output


def test_the_discriminator_is_trained_and_saved(inputs: dict[str, Path], whole: Path) -> None:
    discriminator = trainer(few_steps(inputs, whole, **WITH_DISCRIMINATOR)).run.discriminator
    end = final_tensors(whole)
    assert discriminator is not None
    still = [name for name, before in discriminator.parameters.items() if torch.equal(before, end[f"judge.{name}"])]
    assert not still, f"not trained: {still}"


def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=1, **WITH_DISCRIMINATOR)).train()
    second = trainer(few_steps(inputs, tmp_path, **WITH_DISCRIMINATOR))
    assert second.resume()
    second.train()
    assert equal(final_tensors(whole), final_tensors(tmp_path)), "something that decides the run is not saved"


def test_micro_batches_and_checkpointing_change_nothing(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, micro_batch=1, gradient_checkpointing=True, **WITH_DISCRIMINATOR)).train()
    assert_same_losses(log_of(whole), log_of(tmp_path), NAMES)


def test_two_processes_give_the_losses_of_one(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path / "one", batch=4, micro_batch=4, **WITH_DISCRIMINATOR)).train()
    train_in_two_processes(inputs, tmp_path / "two", batch=4, **WITH_DISCRIMINATOR)
    assert_same_losses(log_of(tmp_path / "one"), log_of(tmp_path / "two"), NAMES)


def test_it_can_join_a_run_that_began_without_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=1)).train()
    joined = trainer(few_steps(inputs, tmp_path, **WITH_DISCRIMINATOR))
    with pytest.raises(ConfigError, match="adversarial_weight"):
        joined.resume()
    assert joined.resume(allow_config_change=True)
    joined.train()
    first, *later = log_of(tmp_path)
    assert "discriminator" not in first and all("discriminator" in record for record in later)


def test_it_counts_in_proportion_to_the_timestep(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses, gradients = [], []
    for weight in (0.0, 0.5):
        prepared = trainer(few_steps(inputs, tmp_path, batch=4, micro_batch=4, adversarial_weight=weight))
        (batch,) = next(prepared.steps())
        run, objective = prepared.run, prepared.run.objective
        micro = run.micro_batch(batch, torch.device("cpu"))
        assert run.teacher is not None
        discriminator = None if run.discriminator is None else run.discriminator.module
        done = objective.student(run.student.module, micro, run.teacher.module, discriminator)
        done.loss.backward()
        losses.append(done.loss.item())
        gradients.append({name: p.grad for name, p in run.student.parameters.items()})
    assert done.compared is not None and discriminator is not None
    timesteps = objective.timestep(micro)
    assert len(set(timesteps.tolist())) > 1
    torch.testing.assert_close(done.compared.weight, timesteps / MAX_TIMESTEP)
    logits = [discriminator(features) for features in (done.compared.photographs, done.compared.results)]
    expected = (timesteps / MAX_TIMESTEP * generator_loss(logits[1])).mean().item()
    assert done.parts["adversarial"].item() == pytest.approx(expected, rel=1e-5)
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-3), "the student is not told"
    assert all(p.grad is None for p in discriminator.parameters()), "the student's loss trains the discriminator"
    without, with_it = gradients
    changed = [name for name, g in without.items() if g is not None and not torch.equal(g, with_it[name])]
    assert changed, "no gradient of the student changes"

    own = discriminator_loss(*logits)
    assert not torch.allclose(own, discriminator_loss(*reversed(logits)))
    weighted = objective.discriminator(discriminator, done.compared)
    torch.testing.assert_close(weighted, (timesteps / MAX_TIMESTEP * own).mean())


def test_crops_too_small_for_it_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop is 24; accepted with adversarial_weight: from 32"):
        few_steps(inputs, tmp_path, crop=24, lpips_shift=4, **WITH_DISCRIMINATOR)
