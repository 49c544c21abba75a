"""The bundled file of a run: the mean of its last checkpoints, in half precision."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import few_steps, trainer

from tadsr.errors import WeightsError
from tadsr.weights import SECTIONS, load, save
from training.config.train_config import resolved
from training.mini import bundle
from training.mini.base import write_mini_base
from training.run.checkpoint import CheckpointError
from training.train import CONFIG_NAME


@pytest.fixture(scope="module")
def run(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that left three checkpoints."""
    config = few_steps(inputs, tmp_path_factory.mktemp("run"), keep=3, self_contained=True)
    trainer(config).train()
    (config.output / CONFIG_NAME).write_text(resolved(config), encoding="utf-8")
    return config.output


def test_it_is_the_mean_of_the_last_checkpoints_in_half_precision(run: Path, tmp_path: Path) -> None:
    command = [str(run), "-o", str(tmp_path / "file.safetensors"), "--last", "2"]
    assert called(*command) == 0
    weights = load(tmp_path / "file.safetensors")
    assert weights.is_self_contained and weights.metadata.name == "tadsr-mini"
    assert weights.metadata.license == "Apache-2.0" and weights.metadata.extra["steps"] == "3"
    assert all(t.dtype == torch.float16 for name in SECTIONS for t in getattr(weights, name).values())

    (earlier, last) = (checkpoint.tensors() for checkpoint in bundle.checkpoints(run, 2))
    name = "student.unet.conv_in.base_layer.weight"
    assert not torch.equal(earlier[name], last[name])
    expected = ((earlier[name] + last[name]) / 2).half()
    (conv_in,) = [tensor for key, tensor in weights.unet_full.items() if key.endswith("weight")]
    torch.testing.assert_close(conv_in, expected, rtol=1e-3, atol=0)  # a bit of float16
    assert not torch.equal(conv_in, last[name].half())


def test_a_base_that_has_changed_is_refused(run: Path, tmp_path: Path) -> None:
    other = write_mini_base(tmp_path, seed=1)
    with pytest.raises(WeightsError, match="is not the base that"):
        bundle.bundled(copy_with(run, tmp_path, "base", str(other)), 1)


def test_checkpoints_of_other_settings_are_not_averaged(run: Path, tmp_path: Path) -> None:
    changed = copy_with(run, tmp_path, "mse_weight", "3.0")
    with pytest.raises(CheckpointError, match=r"other settings \(mse_weight\): average fewer"):
        bundle.bundled(changed, 2)


def test_another_base_than_the_small_one_is_refused(run: Path, tmp_path: Path) -> None:
    base = load(write_mini_base(tmp_path, seed=5))
    other = tmp_path / "other.safetensors"
    save(other, replace(base, metadata=replace(base.metadata, name="Stable Diffusion 2.1")))
    with pytest.raises(WeightsError, match="'Stable Diffusion 2.1'; accepted: a base of training.mini.teacher"):
        bundle.bundled(copy_with(run, tmp_path, "base", str(other)), 1)


def copy_with(run: Path, folder: Path, key: str, value: str) -> Path:
    """Returns a folder like the run's, but with another value in its config."""
    changed = folder / "run"
    changed.mkdir()
    for path in run.iterdir():
        if path.name != CONFIG_NAME:
            (changed / path.name).symlink_to(path)
    lines = (run / CONFIG_NAME).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"{key}:") for line in lines)
    edited = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    (changed / CONFIG_NAME).write_text("\n".join(edited), encoding="utf-8")
    return changed


def test_too_few_checkpoints_or_no_run_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="has 3 checkpoints; accepted: at most that many"):
        bundle.bundled(run, 4)
    assert called(str(tmp_path), "-o", str(tmp_path / "file")) == 1
    assert str(tmp_path / CONFIG_NAME) in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def called(*arguments: str) -> int:
    before, sys.argv = sys.argv, ["bundle", *arguments]
    try:
        return bundle.main()
    finally:
        sys.argv = before
