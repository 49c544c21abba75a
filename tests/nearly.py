"""Comparing what networks compute: equal to the bit is only one computation, repeated on one thread.

Libraries choose kernels by the load of the machine, the number of threads, a tensor's place in memory and the batch,
and each adds up in another order: two computations of the same thing differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROUNDING = 2e-5  # of the largest value: some ten layers of float32 differ by up to 2e-6, and what is wrong by far more


def assert_nearly(result: Tensor, expected: Tensor, message: str = "", *, within: float = ROUNDING) -> None:
    """Fails unless both are of one shape and differ by rounding alone. within: as a part of the largest value."""
    assert result.shape == expected.shape, f"{tuple(result.shape)}, expected {tuple(expected.shape)}: {message}"
    largest = expected.abs().max().item()
    error = (result - expected).abs().max().item()
    assert error <= within * max(largest, 1e-12), f"they differ by {error:.1e}, the largest is {largest:.1e}: {message}"


def differ(a: Tensor, b: Tensor) -> bool:
    """Returns whether two results differ by more than rounding could make them."""
    return (a - b).abs().max().item() > 10 * ROUNDING * b.abs().max().item()


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Runs the block on one thread, where a computation that is repeated is the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
