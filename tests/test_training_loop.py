"""The training loop: what may not change its result, and what ends it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small_learner import equal
from training_pictures import save_picture
from training_runs import (
    LOSSES,
    assert_same_losses,
    few_steps,
    final_tensors,
    log_of,
    train_in_two_processes,
    trainer,
)

from tadsr.weights import load
from training.config.parsing import ConfigError
from training.run.checkpoint import CheckpointError
from training.run.loop import CHECKPOINTS_FOLDER, TrainingStopped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in one go."""
    output = tmp_path_factory.mktemp("whole")
    trainer(few_steps(inputs, output)).train()
    return output


def test_every_trained_tensor_moves_and_the_weights_file_holds_them(inputs: dict[str, Path], whole: Path) -> None:
    start = {f"student.{k}": p for k, p in trainer(few_steps(inputs, whole)).run.student.parameters.items()}
    end = final_tensors(whole)
    still = [key for key, before in start.items() if torch.equal(before, end[key])]
    assert not still, f"{len(still)} of {len(start)} tensors were not trained: {still[:3]}"
    weights = load(whole / "tadsr.safetensors")
    assert weights.is_self_contained and weights.prompt is not None and weights.metadata.extra["steps"] == "3"


def test_a_resumed_run_ends_as_an_uninterrupted_one(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=1)).train()
    second = trainer(few_steps(inputs, tmp_path))
    assert second.resume() and second.counters.step == 1
    second.train()
    assert equal(final_tensors(whole), final_tensors(tmp_path)), "something that decides the run is not saved"


def test_workers_do_not_change_the_result(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, workers=2)).train()
    assert equal(final_tensors(whole), final_tensors(tmp_path))


def test_micro_batches_add_up_to_the_same_step(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, micro_batch=1)).train()
    assert_same_losses(log_of(whole), log_of(tmp_path))


@pytest.mark.parametrize("change", [{"distillation": "none"}, {"distillation": "vsd"}, {"reconstruction": "mse"}])
def test_the_ablations_change_the_student(
    inputs: dict[str, Path], whole: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    trainer(few_steps(inputs, tmp_path, **change)).train()
    full, ablated = (
        {name: t for name, t in final_tensors(output).items() if name.startswith("student.")}
        for output in (whole, tmp_path)
    )
    assert full.keys() == ablated.keys() and not equal(full, ablated)


def test_a_degradation_on_the_training_device_gives_nearly_the_same_samples(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    batches = []
    for place in ("workers", "device"):
        prepared = trainer(few_steps(inputs, tmp_path, degrade_on=place, batch=6, micro_batch=6, light_share=0.99))
        (batch,) = next(prepared.steps())
        batches.append(prepared.run.micro_batch(batch, torch.device("cpu")))
    by_workers, on_device = batches
    assert torch.equal(by_workers.hq, on_device.hq)
    difference = (by_workers.lq - on_device.lq).abs().mean().item()
    assert 0 < difference < 0.06, f"they differ by {difference:.3f}: noise differs, the rest should not"
    assert (on_device.lq - on_device.hq).abs().mean() > 0.02, "nothing was degraded"


def test_two_processes_give_the_losses_of_one(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path / "one", batch=4, micro_batch=4)).train()
    train_in_two_processes(inputs, tmp_path / "two", batch=4)
    assert_same_losses(log_of(tmp_path / "one"), log_of(tmp_path / "two"))


def test_bf16_gives_nearly_the_same_losses(inputs: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, mixed_precision="bf16", steps=1)).train()
    (exact, *_), (rounded,) = log_of(whole), log_of(tmp_path)
    for name in LOSSES:
        assert rounded[name] == pytest.approx(exact[name], rel=0.15) and rounded[name] != exact[name], name


def test_gradient_checkpointing_changes_nothing_but_the_memory(
    inputs: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    trainer(few_steps(inputs, tmp_path, gradient_checkpointing=True)).train()
    assert_same_losses(log_of(whole), log_of(tmp_path))


def test_other_settings_are_refused_on_resume(inputs: dict[str, Path], whole: Path) -> None:
    changed = trainer(few_steps(inputs, whole, seed=6, lpips_weight=1))
    with pytest.raises(ConfigError, match=r"lpips_weight was 2\.0, is 1\.0; seed was 5, is 6.*--allow-config-change"):
        changed.resume()
    assert changed.resume(allow_config_change=True)


def test_other_pictures_or_another_base_are_refused_on_resume(
    inputs: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    for number in range(4):
        save_picture(tmp_path / "others" / f"{number}.png", seed=number)
    other = trainer(few_steps(inputs | {"data": tmp_path / "others"}, whole))
    with pytest.raises(ConfigError, match="data was .*; pictures_sha256 was"):
        other.resume()


def test_the_log_forgets_the_steps_that_are_done_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    trainer(few_steps(inputs, tmp_path, steps=2)).train()
    shutil.rmtree(tmp_path / CHECKPOINTS_FOLDER / "step-00000002")
    again = trainer(few_steps(inputs, tmp_path, steps=2))
    again.resume()
    again.train()
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]


def test_another_rank_cannot_be_resumed(inputs: dict[str, Path], whole: Path) -> None:
    other = trainer(few_steps(inputs, whole, rank=8))
    with pytest.raises(CheckpointError, match="rank 16 in the checkpoint, 8 now"):
        other.resume(allow_config_change=True)


def test_losses_that_are_no_numbers_are_skipped_and_then_end_the_run(inputs: dict[str, Path], tmp_path: Path) -> None:
    started = trainer(few_steps(inputs, tmp_path, steps=1))
    started.train()
    broken = trainer(few_steps(inputs, tmp_path, steps=6, max_bad_steps=3, save_every=1000))
    broken.resume()
    next(iter(broken.run.student.parameters.values())).data.fill_(float("nan"))
    assert broken.run.teacher is not None
    good = {name: p.clone() for name, p in broken.run.teacher.parameters.items()}
    with pytest.raises(TrainingStopped) as stopped:
        broken.train()
    message = str(stopped.value)
    assert "step 4" in message and "3 times in a row" in message and "step-00000001" in message
    assert message.count(".png") == 2, f"the samples are not named: {message}"
    assert all(torch.equal(p, good[name]) for name, p in broken.run.teacher.parameters.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint(inputs: dict[str, Path], tmp_path: Path, number: int) -> None:
    life = trainer(few_steps(inputs, tmp_path, steps=1000, save_every=1000, workers=2))
    process = os.fork()
    if process == 0:
        try:
            os.setsid()  # the signal goes to the workers too, as that of a terminal or a launcher
            torch.set_num_threads(1)
            life.train()
            os._exit(0)
        finally:  # never back into pytest
            os._exit(1)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 300
    while not log.is_file() or not log.read_text():  # the first step is done
        assert time.monotonic() < deadline, "no step was done in five minutes"
        time.sleep(0.01)
    os.killpg(process, number)
    assert os.waitpid(process, 0)[1] == 0, "it did not end well"
    (folder,) = (tmp_path / CHECKPOINTS_FOLDER).iterdir()
    assert 1 <= int(folder.name.removeprefix("step-")) < 1000
    assert (tmp_path / "tadsr.safetensors").is_file()
