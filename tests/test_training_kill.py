"""A training that is killed at random moments, also while it writes, ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_learner import equal
from training_runs import few_steps, final_tensors, make_inputs, trainer

from training.metrics.lpips import LPIPS
from training.run.checkpoint import Checkpoints
from training.run.loop import CHECKPOINTS_FOLDER, Trainer

STEPS, KILLS, KEEP = 60, 22, 2
LONGEST_LIFE = 300  # seconds without a checkpoint
LONGEST_WAIT = 0.3  # seconds between a checkpoint and the kill: about a step and its checkpoint


def life_of(prepared: Trainer) -> int:
    """Starts a process that resumes and trains; returns its number."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            prepared.resume()
            prepared.train()
            os._exit(0)
        finally:  # never back into pytest
            os._exit(1)
    return process


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_training_ends_as_one_that_was_not(tmp_path: Path, lpips_network: Callable[[str], LPIPS]) -> None:
    lpips_network("vgg")  # runs load their own
    inputs, output, rng = make_inputs(tmp_path), tmp_path / "killed", random.Random(0)
    folder = output / CHECKPOINTS_FOLDER
    output.mkdir()
    torch.set_num_threads(1)
    settings = {"steps": STEPS, "keep": KEEP, "batch": 1, "micro_batch": 1}
    uninterrupted = few_steps(inputs, tmp_path / "whole", **settings)
    prepared = trainer(few_steps(inputs, output, **settings))
    whole = life_of(trainer(uninterrupted))
    kills = writing = 0
    while kills < KILLS:
        process, before, started = life_of(prepared), newest(folder), time.monotonic()
        while newest(folder) == before or (kills % 2 and not is_writing(folder)):
            assert time.monotonic() - started < LONGEST_LIFE, f"no checkpoint after {before or 'the start'}"
        if not kills % 2:  # every second kill falls into the writing of a checkpoint
            time.sleep(rng.uniform(0, LONGEST_WAIT))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), f"the run was over after {kills} kills"
        kills += 1
        writing += is_writing(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a half-written checkpoint would be warned about
            assert Checkpoints(folder, KEEP, writes=False).latest() is not None
    assert writing >= 5, f"only {writing} kills fell into the writing of a checkpoint"
    assert os.waitpid(life_of(prepared), 0)[1] == 0
    assert os.waitpid(whole, 0)[1] == 0
    assert equal(final_tensors(tmp_path / "whole"), final_tensors(output))
    assert len(steps_in(folder)) == KEEP


def is_writing(folder: Path) -> bool:
    return any(path.name.startswith(".step-") for path in folder.iterdir())


def newest(folder: Path) -> str:
    return max((name for name in steps_in(folder)), default="") if folder.is_dir() else ""
