"""Samples in batches: which sample belongs to which step, process and micro batch, and putting them together."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from training.degradation import DegradationParameters


@dataclass(frozen=True)
class Sample:
    """One training sample; images (3, crop, crop) in [-1, 1], lq enlarged to the size of hq."""

    index: int  # the global sample index
    name: str  # of the picture
    lq: Tensor
    hq: Tensor
    prompt: str
    degradation: DegradationParameters | None = None  # still to be applied: lq is the undegraded hq


class Batch(NamedTuple):
    """Samples together; images (B, 3, crop, crop) in [-1, 1]. A tuple, so that a DataLoader can pin its memory."""

    indices: tuple[int, ...]
    names: tuple[str, ...]
    lq: Tensor
    hq: Tensor
    prompts: tuple[str, ...]
    degradations: tuple[DegradationParameters | None, ...]  # see Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Returns the samples as a batch."""
    return Batch(
        indices=tuple(sample.index for sample in samples),
        names=tuple(sample.name for sample in samples),
        lq=torch.stack([sample.lq for sample in samples]),
        hq=torch.stack([sample.hq for sample in samples]),
        prompts=tuple(sample.prompt for sample in samples),
        degradations=tuple(sample.degradation for sample in samples),
    )


class StepBatches(Sampler[list[int]]):
    """Yields this process's global sample indices for the steps start_step..stop_step-1, a micro batch at a time.

    Step s (from 0) has the samples s * batch ... (s + 1) * batch - 1, whatever the number of processes and the micro
    batch. They are dealt in micro batches to one process after the other. Do not let Accelerate prepare a DataLoader
    of this sampler: it would deal the indices out a second time.
    """

    def __init__(
        self, batch: int, micro_batch: int, process: int, processes: int, start_step: int, stop_step: int
    ) -> None:
        if min(batch, micro_batch, processes) < 1 or batch % (micro_batch * processes):
            raise ValueError(
                f"batch is {batch}, with a micro batch of {micro_batch} in {processes} processes; accepted: a multiple "
                f"of {micro_batch} x {processes} = {micro_batch * processes}"
            )
        if not 0 <= process < processes:
            raise ValueError(f"process is {process}; accepted: 0..{processes - 1}")
        self.batch, self.micro_batch, self.process, self.processes = batch, micro_batch, process, processes
        self.start_step, self.stop_step = start_step, stop_step

    @property
    def micro_batches(self) -> int:
        """Micro batches of this process in a step."""
        return self.batch // (self.micro_batch * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.stop_step):
            for turn in range(self.micro_batches):
                dealt = (turn * self.processes + self.process) * self.micro_batch
                first = step * self.batch + dealt
                yield list(range(first, first + self.micro_batch))

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.micro_batches


def worker_init(worker: int) -> None:
    """Prepares a DataLoader's worker process: Ctrl-C and SIGTERM are left to the training loop.

    Terminals and launchers send them to workers too; one that died of it would end the run before its checkpoint is
    written. Workers end when the loop does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
