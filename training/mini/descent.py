"""What the trainings of the bundled model's networks share: how the rate falls, and how weights are averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def half_cosine(progress: float, least: float) -> float:
    """Returns the share of the peak rate, from 1 down to `least`. progress: 0..1; more counts as 1."""
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def follow(average: Iterable[Tensor], trained: Iterable[Tensor], step: int, most: float) -> None:
    """Moves averaged weights towards the trained ones after `step` steps; most: of the averages that is kept."""
    decay = min(most, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average), list(trained), 1 - decay)
