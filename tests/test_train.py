"""The command line of training: a whole run, a plan, and errors that say what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training_runs import few_steps, log_of

from training.config.train_config import PRESETS
from training.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = ("--config", str(PRESETS / "smoke.yaml"))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state()  # it keeps the precision of a process's first run


def command(inputs: dict[str, Path], output: Path, *more: str) -> list[str]:
    paths = [part for name, path in (*inputs.items(), ("output", output)) for part in (f"--{name}", str(path))]
    return [*SMOKE, *paths, "crop=32", "steps=1", "validate_every=1", "validation_count=2", *more]


def test_a_run_leaves_weights_log_validation_and_settings(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inputs["data"] / "broken.png").write_bytes(b"no picture")
    try:
        assert main(command(inputs, tmp_path)) == 0
    finally:
        (inputs["data"] / "broken.png").unlink()
    output = capsys.readouterr()
    assert "started: 4 pictures, 2 for validation" in output.out and "tadsr.safetensors" in output.out
    assert "broken.png" in output.err and "broken.png" in (tmp_path / "skipped.txt").read_text()
    sheet = Image.open(tmp_path / "validation" / "step-00000001.png")
    assert sheet.width == 128 * 5 and sheet.height > 2 * 128  # input, three timesteps, photograph; magnified 4 times
    validated = [line["step"] for line in log_of(tmp_path) if "validation/psnr_y/t500" in line]
    assert validated == [0, 1], "validation belongs before the first step and after every validate_every"
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "tadsr.safetensors").is_file()
    assert "time_learning_rate: 1.0e-06" in (tmp_path / "config.yaml").read_text()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_names_that_are_no_text_are_taken_for_what_they_are(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        shutil.copytree(inputs["data"], data)
        shutil.copy(data / "0.png", Path(os.fsdecode(os.fsencode(data) + b"/\xff\n.PNG")))
        shutil.copy(data / "0.png", Path(os.fsdecode(os.fsencode(data) + b"/small\xfe.png")))
    except OSError as error:  # macOS
        pytest.skip(f"this file system takes no such name: {error}")
    (data / os.fsdecode(b"small\xfe.png")).write_bytes(b"no picture")
    for name in ("x.png", "0.txt", "y.tar"):
        os.mkfifo(data / name)
    os.symlink("nowhere", data / "lost.jpg")
    given = {**inputs, "data": data}
    assert main(command(given, tmp_path / "run", "data_format=folder", "prompts=auto")) == 0
    left_out = (tmp_path / "run" / "skipped.txt").read_text(encoding="utf-8")
    assert "x.png: cannot be read (not a regular file)" in left_out
    assert "0.txt: cannot be read (not a regular file)" in left_out
    assert "lost.jpg: cannot be read (No such file or directory)" in left_out
    assert "small\\udcfe.png: is no picture" in left_out
    assert "started: 5 pictures, 2 for validation" in capsys.readouterr().out
    AcceleratorState._reset_state()
    assert main(command(given, tmp_path / "run", "data_format=folder", "prompts=auto", "steps=2")) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    AcceleratorState._reset_state()
    (data / "x.png").unlink()
    assert main(command(given, tmp_path / "other", "data_format=shards", "--dry-run")) == 1
    assert "y.tar: is no uncompressed tar file that can be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run of two steps in one go."""
    output = tmp_path_factory.mktemp("whole")
    AcceleratorState._reset_state()
    assert main(command(inputs, output, "validate_every=0", "save_every=1", "steps=2")) == 0
    return load_file(output / "tadsr.safetensors")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (4096, "No space left on device. What the run has written is kept: mend that, and run the same command again"),
        (20_000_000, "step-00000001 could not be written (No space left on device): it needs 24,9"),
        (40_000_000, "tadsr.safetensors could not be written (Error while serializing: I/O error: No space left"),
    ],
)
def test_a_full_disk_ends_a_run_in_one_sentence_and_loses_nothing(
    size: int,
    words: str,
    disk_of: Callable[[int], Path],
    inputs: dict[str, Path],
    whole: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = disk_of(size)
    arguments = command(inputs, disk / "run", "validate_every=0", "save_every=1", "steps=2")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error
    assert not [path for path in disk.rglob("*") if ".tmp" in path.name]
    disk_of(2**28)
    AcceleratorState._reset_state()
    assert main(arguments) == 0
    assert ("resumed at step 1" in capsys.readouterr().out) == (size > 30_000_000)
    end = load_file(disk / "run" / "tadsr.safetensors")
    assert end.keys() == whole.keys() and all(torch.equal(end[key], whole[key]) for key in end)


def test_a_dry_run_tells_sizes_and_memory_and_writes_nothing(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(inputs, tmp_path / "run", "--dry-run")) == 0
    plan = capsys.readouterr().out
    for text in ("crop: 32", "4 pictures", "5.65 M parameters in the UNet", "steps an epoch", "GiB"):
        assert text in plan
    assert not (tmp_path / "run").exists()


def test_the_planned_memory_grows_with_the_crop_and_shrinks_with_checkpointing(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def activations(*more: str) -> float:
        assert main(command(inputs, tmp_path, "--dry-run", *more)) == 0
        return float(capsys.readouterr().out.rsplit(" activations", 1)[0].rsplit(" ", 1)[1])

    assert activations("crop=48", "micro_batch=64", "batch=64") == pytest.approx(
        2.25 * activations("micro_batch=64", "batch=64"), rel=0.05
    )
    assert activations("micro_batch=64", "batch=64", "gradient_checkpointing=true") < 0.6 * activations(
        "micro_batch=64", "batch=64"
    )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["lerning_rate=1e-4"], ["lerning_rate", "learning_rate"]),
        (["batch=0"], ["batch is", "0"]),
        (["crop=512"], ["512", "56x48"]),
        (["--base", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["mixed_precision=fp16"], ["fp16", "no, bf16"]),
        (["--data", "nowhere"], ["nowhere", "no such"]),
        (["init_weights=nowhere.safetensors"], ["nowhere.safetensors", "no such"]),
        (["prompt=something else"], ["something else", "prompts.safetensors"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "smoke.yaml"]),
    ],
)
def test_bad_input_is_one_clear_error(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: list[str]
) -> None:
    assert main(command(inputs, tmp_path, *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("training: ") and all(text in error for text in named), error


def test_an_empty_folder_is_one_clear_error(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(command(inputs, tmp_path / "run", "--data", str(tmp_path / "empty"))) == 1
    assert "empty" in capsys.readouterr().err


def test_settings_are_what_the_command_says(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = few_steps(inputs, tmp_path, lam=0.75)
    assert (config.lam, config.base, config.self_contained) == (0.75, inputs["base"], True)
