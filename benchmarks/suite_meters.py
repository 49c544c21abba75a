"""Memory of this process in MB: on the GPU where ComfyUI uses one, else resident."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.full_size import RESET_PEAK
from benchmarks.inference import MEGABYTE, resident_memory
from host.errors import HostError


def on_gpu() -> bool:
    """Returns whether there is a GPU that is measured with CUDA's own events and counters."""
    return torch.cuda.is_available()


def held_mb() -> float:
    """Returns what is held now."""
    return torch.cuda.memory_allocated() / MEGABYTE if on_gpu() else _resident("VmRSS")


def begin_peak() -> None:
    """Makes `peak_mb` count from now."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def peak_mb() -> float:
    """Returns the most that was held since `begin_peak`."""
    return torch.cuda.max_memory_allocated() / MEGABYTE if on_gpu() else _resident("VmHWM")


def _resident(field: str) -> float:
    memory = resident_memory(os.getpid(), field)
    if memory is None:
        raise HostError("this system does not tell a process's memory; run the suite on Linux")
    return memory
