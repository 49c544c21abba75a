"""The command line of training: a whole run, a plan, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from training_runs import few_steps, log_of

from training.config.train_config import PRESETS
from training.train import main

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
