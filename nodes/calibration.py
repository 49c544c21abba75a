"""Seconds that each phase took on this machine, for the progress bar and the estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from ..tadsr.geometry import Region
from .memory import PREDICT
from .plan import PhasePlan

# Time of the phases for one latent pixel before anything was measured, relative to each other.
TYPICAL_SHARES = {"encode": 0.3, PREDICT: 0.2, "decode": 0.5}

_seconds_per_pixel: dict[tuple[str, ...], float] = {}


def seconds_for(plan: PhasePlan) -> float | None:
    """Returns the seconds that the phase will take by the latest run with the same network, or None before one."""
    seconds = _seconds_per_pixel.get(_key(plan))
    return None if seconds is None else seconds * plan.work


def expected_times(plans: Sequence[PhasePlan]) -> list[float]:
    """Returns the times that the phases will take, in seconds or, before all were measured, in any one unit."""
    seconds = [seconds_for(plan) for plan in plans]
    if None not in seconds:
        return [second for second in seconds if second is not None]
    return [TYPICAL_SHARES[plan.cost.phase] * plan.work for plan in plans]


@contextmanager
def measured(plan: PhasePlan, region: Region | None = None) -> Iterator[None]:
    """Measures a phase that the block runs by this plan on one picture, or on a region of it; latent pixels."""
    begin = perf_counter()
    yield
    _seconds_per_pixel[_key(plan)] = (perf_counter() - begin) / plan.work_for(region or plan.tiles.whole)


def _key(plan: PhasePlan) -> tuple[str, ...]:
    cost = plan.cost
    return (cost.phase, str(cost.patcher.model_size()), str(cost.dtype), str(cost.patcher.load_device))
