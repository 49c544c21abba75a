"""Checkpoints: round trips, what is kept, damage and full disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_learner import bits
from torch import nn

from training.run.checkpoint import Checkpoint, CheckpointError, Checkpoints

PAGE = 4096  # of the small file systems


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, {"weight": torch.full((100,), float(step))}, {"step": step})
    return checkpoints


def latest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.latest()
    assert found is not None
    return found


def test_tensors_and_state_come_back_to_the_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 6, generator=generator)
    tensors = {
        "odd": torch.tensor([float("nan"), -0.0, 1e-45, float("-inf")]),
        "transposed": matrix.T,
        "part": matrix[2:4, 1:],
        "half": matrix.half(),
        "bfloat": matrix.bfloat16(),
        "number": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "trained": nn.Parameter(matrix),
        "channels last": torch.randn(1, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
    }
    state = {"config": {"betas": [0.9, 0.1 + 0.2], "validation": None}, "scale": 65536.0, "names": ["ä", "b"]}
    path = Checkpoints(tmp_path / "a" / "b", 1).save(123, tensors, state)
    assert path.name == "step-00000123"
    checkpoint = latest(Checkpoints(tmp_path / "a" / "b", 1))
    assert (checkpoint.step, checkpoint.path, checkpoint.state()) == (123, path, state)
    loaded = checkpoint.tensors()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bits(loaded[name]) == bits(tensor), f"{name} changed"


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", 3)
    assert checkpoints.latest() is None and checkpoints.all() == []
    filled(tmp_path / "run", 5, 10, 15, 20, keep=3)
    assert folders(tmp_path / "run") == ["step-00000010", "step-00000015", "step-00000020"]
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [10, 15, 20]
    assert latest(checkpoints).step == 20
    filled(tmp_path / "run", 100_000_000, keep=1)
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [100_000_000]
    with pytest.raises(ValueError, match="keep is 0; accepted: integers from 1"):
        Checkpoints(tmp_path, 0)


def test_a_reader_makes_and_removes_nothing(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 1, writes=False).latest() is None and not (tmp_path / "none").exists()
    (tmp_path / f".step-00000001.tmp-{dead_process()}").mkdir()
    Checkpoints(tmp_path, 1, writes=False)
    assert len(folders(tmp_path)) == 1


def test_saving_a_step_again_keeps_what_is_sound_and_replaces_what_is_not(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 1, 2)
    checkpoints.save(2, {}, {"step": "another"})
    assert latest(checkpoints).state() == {"step": 2}
    truncate(tmp_path / "step-00000002" / "tensors.safetensors")
    filled(tmp_path, 2)
    assert latest(checkpoints).step == 2 and folders(tmp_path) == ["step-00000001", "step-00000002"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    checkpoints = filled(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged: .*; going on from step-00000001"):
        found = latest(checkpoints)
    assert found.step == 1 and torch.equal(found.tensors()["weight"], torch.ones(100))
    truncate(tmp_path / "step-00000001" / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*-00000002 is damaged: .*-00000001 is damaged"):
        checkpoints.latest()


def test_reading_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (checkpoint,) = filled(tmp_path, 1).all()
    size = (checkpoint.path / "tensors.safetensors").stat().st_size
    truncate(checkpoint.path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=f"tensors.safetensors has {size // 2} bytes instead of {size}"):
        checkpoint.tensors()
    assert checkpoint.state() == {"step": 1}
    flip_a_bit(checkpoint.path / "state.json")
    with pytest.raises(CheckpointError, match="the content of state.json is not what was written"):
        checkpoint.state()


def test_the_last_good_checkpoint_outlives_a_damaged_later_one(tmp_path: Path) -> None:
    filled(tmp_path, 10, 30)
    truncate(tmp_path / "step-00000030" / "state.json")
    checkpoints = filled(tmp_path, 20, keep=1)  # the run went on from 10 and saved at another step
    with pytest.warns(UserWarning, match="step-00000030 is damaged"):
        assert latest(checkpoints).step == 20
    filled(tmp_path, 30, keep=1)
    assert folders(tmp_path) == ["step-00000030"] and latest(checkpoints).step == 30


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_runs_left_is_removed_at_the_start(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    dead = dead_process()
    left = [f".step-00000002.tmp-{dead}", f".step-00000000.old-{dead}", f".step-00000002.tmp-{os.getpid()}"]
    others = [f".step-00000002.tmp-{os.getppid()}", "step-00000002-mine", ".step-00000003"]
    for name in left + others:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert latest(Checkpoints(tmp_path, 1)).step == 1
    assert folders(tmp_path) == sorted(["step-00000001", *others])


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoints.save(2, {}, {"path": tmp_path})
    (tmp_path / ".step-00000002.tmp-0").touch()  # an ordinary file of another name is no obstacle
    filled(tmp_path, 2)
    assert latest(checkpoints).step == 2


@pytest.fixture
def small_disk(disk_of: Callable[[int], Path]) -> Path:
    """A file system of 1 MiB."""
    return disk_of(2**20)


def test_a_full_disk_says_how_much_is_needed_and_keeps_the_last_checkpoint(small_disk: Path) -> None:
    checkpoints = filled(small_disk, 1)
    free = shutil.disk_usage(small_disk).free
    tensors = {"large": torch.zeros(2**18)}  # 1 MiB
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, tensors, {})
    message = str(error.value)
    needed = int(message.split("it needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 2**20 < needed < 2**20 + 2000
    assert message.startswith("step-00000002 could not be written (No space left on device)")
    assert f"in {small_disk}, where {free:,} are free; the last good checkpoint, step-00000001, is kept" in message
    assert folders(small_disk) == ["step-00000001"] and latest(checkpoints).step == 1
    checkpoints.save(2, {"small": torch.zeros(2**10)}, {})
    assert latest(checkpoints).step == 2


def test_at_every_amount_of_room_a_checkpoint_is_whole_or_absent(small_disk: Path) -> None:
    checkpoints = filled(small_disk, 1)
    ballast = small_disk / "ballast"
    outcomes: list[bool] = []
    good = 1
    for pages in range(24, 0, -1):
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - pages * PAGE))
        try:
            checkpoints.save(100 - pages, {"weight": torch.zeros(2 * PAGE)}, {"text": "x" * 3 * PAGE})
            outcomes.append(True)
        except CheckpointError:
            outcomes.append(False)
        assert not list(small_disk.glob(".*"))
        good = 100 - pages if outcomes[-1] else good
        assert latest(checkpoints).step == good
    assert outcomes[0] and not outcomes[-1] and outcomes == sorted(outcomes, reverse=True)


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs the limits of POSIX")
    checkpoints = filled(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written \(File too large\): it needs"):
            checkpoints.save(2, {"large": torch.zeros(2**16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(tmp_path) == ["step-00000001"]
