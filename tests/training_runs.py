"""Small training runs for tests: pictures, a base model, a config of a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from training_pictures import save_picture

from training.config.train_config import PRESETS, TrainConfig, load_config
from training.mini.base import write_mini_base
from training.run.build import Run, build_run, open_data
from training.run.checkpoint import Checkpoints
from training.run.log import LOG_NAME
from training.run.loop import CHECKPOINTS_FOLDER, Trainer

PICTURES = 6
LOSSES = ("mse", "lpips", "distillation", "fake_score")
FEW_STEPS: dict[str, Any] = {
    **{"crop": 32, "batch": 2, "micro_batch": 2, "steps": 3, "save_every": 1, "log_every": 1, "workers": 0},
    **{"validate_every": 0, "validation_count": 1, "light_share": 0.5, "seed": 5},
}


def make_inputs(folder: Path) -> dict[str, Path]:
    """Writes pictures and a base model; returns them by the names of the config."""
    for number in range(PICTURES):
        save_picture(folder / "pictures" / f"{number}.png", seed=number)
    return {"data": folder / "pictures", "base": write_mini_base(folder / "base")}


def few_steps(inputs: dict[str, Path], output: Path, **changes: object) -> TrainConfig:
    """Returns the smoke preset, made still smaller, with changes."""
    settings = {key: str(value) for key, value in (FEW_STEPS | changes).items()}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(PRESETS / "smoke.yaml", overrides, output=output, **inputs)


def build(config: TrainConfig) -> Run:
    return build_run(config, open_data(config), accelerator(config))


def trainer(config: TrainConfig, run: Run | None = None) -> Trainer:
    return Trainer(run or build(config), accelerator(config))


def accelerator(config: TrainConfig) -> Accelerator:
    """Returns a new one; Accelerate keeps the precision of a process's first one for all."""
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=config.mixed_precision)


def final_tensors(output: Path) -> dict[str, Tensor]:
    """Returns what the newest checkpoint of a run holds."""
    checkpoint = Checkpoints(output / CHECKPOINTS_FOLDER, 1, writes=False).latest()
    assert checkpoint is not None, f"the run in {output} left no checkpoint"
    return load_file(checkpoint.path / "tensors.safetensors")


def log_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / LOG_NAME).read_text().splitlines()]


def train_in_two_processes(inputs: dict[str, Path], output: Path, **changes: object) -> None:
    """Trains with micro batches of one picture in each process."""
    config = few_steps(inputs, output, micro_batch=1, **changes)
    varied = ("crop", "batch", "steps", "light_share", "seed", *changes)
    settings = [f"{key}={getattr(config, key)}" for key in dict.fromkeys(varied)]
    settings += ["micro_batch=1", "workers=0", "validate_every=0", "validation_count=1", "log_every=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "training.train", "--config", "training/presets/smoke.yaml"]
    for name, path in (*inputs.items(), ("output", output)):
        command += [f"--{name}", str(path)]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def assert_same_losses(
    expected: list[dict[str, float]], seen: list[dict[str, float]], names: tuple[str, ...] = LOSSES
) -> None:
    assert len(expected) == len(seen) == 3
    for step, (one, other) in enumerate(zip(expected, seen, strict=True), start=1):
        for name in names:
            # Adam turns the rounding of tiny gradients into steps of full size, so later steps differ more.
            assert other[name] == pytest.approx(one[name], rel=2e-4 if step == 1 else 2e-2), f"step {step}: {name}"
