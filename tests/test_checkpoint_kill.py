"""Runs that are killed at any moment, also while they write a checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_learner import KEEP, Learner, equal
from torch import Tensor

from training.run.checkpoint import Checkpoints

STEPS, KILLS = 90, 22  # of the killed run: no life lasts more than about four steps


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Life:
    """A process that trains and can be killed at any moment."""

    def __init__(self, folder: Path) -> None:
        reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                os.close(reading)
                torch.set_num_threads(1)
                Learner(folder=folder).train(STEPS, lambda: os.write(writing, b"s"))
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        self.reading = reading

    def wait_for_steps(self, count: int) -> None:
        for _ in range(count):
            os.read(self.reading, 1)

    def end(self, number: int | None) -> int:
        if number is not None:
            os.kill(self.process, number)
        status = os.waitpid(self.process, 0)[1]
        os.close(self.reading)
        return status


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    reference, whole = Learner(), []
    for number in range(STEPS):
        reference.step(number)
        whole.append({name: tensor.detach().clone() for name, tensor in reference.tensors()[0].items()})
    began = time.monotonic()
    Learner(folder=tmp_path / "timing").train(8)
    step_seconds = (time.monotonic() - began) / 8
    rng = random.Random(0)
    folder, unfinished, last = tmp_path / "run", 0, 0
    for _ in range(KILLS):
        life = Life(folder)
        life.wait_for_steps(rng.randrange(3))
        time.sleep(rng.random() * 1.5 * step_seconds)
        assert life.end(signal.SIGKILL) == signal.SIGKILL, "the run ended before it was killed"
        unfinished += any(path.name.startswith(".step-") for path in folder.glob(".*"))
        last = check_after_kill(folder, last, whole)
    assert unfinished >= 3, f"only {unfinished} of {KILLS} kills came while a checkpoint was being written"
    assert 0 < last < STEPS
    assert Life(folder).end(None) == 0
    assert check_after_kill(folder, last, whole) == STEPS
    assert folders(folder) == [f"step-{step:08d}" for step in range(STEPS - KEEP + 1, STEPS + 1)]


def check_after_kill(folder: Path, last: int, whole: list[dict[str, Tensor]]) -> int:
    """Returns the newest checkpoint's step, after comparing every checkpoint with the uninterrupted run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a checkpoint is damaged
        checkpoints = Checkpoints(folder, KEEP, writes=False)
        newest = checkpoints.latest()
    steps = [checkpoint.step for checkpoint in checkpoints.all()]
    assert all(b == a + 1 for a, b in pairwise(steps)) and len(steps) <= KEEP + 1
    for checkpoint in checkpoints.all():
        assert equal(checkpoint.tensors(), whole[checkpoint.step - 1]), f"step {checkpoint.step} differs"
    step = newest.step if newest else 0
    assert step >= last, "a finished checkpoint was lost"
    return step
