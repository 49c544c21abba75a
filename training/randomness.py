"""Random numbers of training as functions of the run's seed, a purpose and the sample, and of nothing else.

No generator lives from step to step: the number of processes, the size of micro batches and a resume change nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def sample_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """Returns a CPU generator for one purpose (e.g. "latent") and the sample with this number."""
    state = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Gives the default CPU generator, from which new layers draw, the seed of one purpose; restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_generator(seed, purpose, 0).initial_seed())
        yield


def sample_noise(seed: int, purpose: str, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal noise, (B, *shape) float32 on the CPU, of the samples with these numbers."""
    return torch.stack([torch.randn(shape, generator=sample_generator(seed, purpose, i)) for i in indices])


def sample_integers(seed: int, purpose: str, indices: Sequence[int], low: int, high: int) -> Tensor:
    """Returns integers, (B,) int64, uniform in low..high (both included), of the samples with these numbers."""
    draws = [torch.randint(low, high + 1, (), generator=sample_generator(seed, purpose, i)) for i in indices]
    return torch.stack(draws)
