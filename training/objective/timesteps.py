"""Which timesteps training uses: the student's, the teacher's and the fake score's, (B,) int64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tadsr.schedule import NUM_TIMESTEPS, teacher_timestep, timestep_grid
from training.objective.settings import LossSettings
from training.randomness import sample_integers

VSD_RANGE = (20, 979)  # plain variational score distillation: the middle 96 % (behaviour of the official code)


def student_timesteps(settings: LossSettings, indices: Sequence[int]) -> Tensor:
    """Returns the student's timestep of each sample, uniform over `settings.timestep_grid`."""
    grid = torch.tensor(timestep_grid(settings.timestep_grid))
    return grid[sample_integers(settings.seed, "student timestep", indices, 0, len(grid) - 1)]


def distillation_timesteps(settings: LossSettings, timestep: Tensor, indices: Sequence[int]) -> Tensor:
    """Returns the teacher's timesteps: eq. 5 for TAVSD, random ones for plain VSD."""
    if settings.distillation == "tavsd":
        return teacher_timestep(timestep, settings.lam, settings.gamma)
    return sample_integers(settings.seed, "teacher timestep", indices, *VSD_RANGE)


def fake_score_timesteps(settings: LossSettings, indices: Sequence[int]) -> Tensor:
    """Returns the timesteps at which the fake score learns, uniform over 0..999 (paper, equation 10)."""
    return sample_integers(settings.seed, "fake score timestep", indices, 0, NUM_TIMESTEPS - 1)
