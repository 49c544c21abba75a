"""Which timesteps training draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from tadsr.schedule import timestep_grid
from training.config.train_config import TrainConfig
from training.objective.settings import LossSettings
from training.objective.timesteps import distillation_timesteps, fake_score_timesteps, student_timesteps

SAMPLES = range(20_000)


@pytest.fixture(scope="module")
def paper() -> LossSettings:
    return LossSettings.of(TrainConfig(data=Path("data"), base=Path("base"), output=Path("output")))


@pytest.mark.parametrize("count", [50, 0, 1])
def test_the_student_s_are_uniform_over_the_grid(paper: LossSettings, count: int) -> None:
    drawn = student_timesteps(replace(paper, timestep_grid=count), SAMPLES)
    grid = timestep_grid(count)
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == list(grid)
    if len(grid) > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_the_teacher_s_follow_the_student_s_or_are_random(paper: LossSettings) -> None:
    students = torch.tensor([1, 401, 999])
    assert distillation_timesteps(paper, students, range(3)).tolist() == [0, 200, 499]
    moved = replace(paper, lam=0.25, gamma=50.0)
    assert distillation_timesteps(moved, students, range(3)).tolist() == [50, 150, 299]
    plain = distillation_timesteps(replace(paper, distillation="vsd"), torch.ones(len(SAMPLES)), SAMPLES)
    assert (plain.min().item(), plain.max().item()) == (20, 979), "the middle 96 %"
    assert stats.kstest(plain.numpy(), "randint", args=(20, 980)).pvalue > 1e-3


def test_the_fake_score_s_are_uniform_over_all(paper: LossSettings) -> None:
    drawn = fake_score_timesteps(paper, SAMPLES)
    assert (drawn.min().item(), drawn.max().item()) == (0, 999)
    assert stats.kstest(drawn.numpy(), "randint", args=(0, 1000)).pvalue > 1e-3


def test_draws_belong_to_the_seed_and_the_sample(paper: LossSettings) -> None:
    assert student_timesteps(paper, [5, 9]).tolist() == student_timesteps(paper, range(10))[[5, 9]].tolist()
    assert student_timesteps(paper, range(20)).tolist() != student_timesteps(replace(paper, seed=1), range(20)).tolist()
