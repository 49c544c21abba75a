from __future__ import annotations

import pytest
import torch

from tadsr import schedule


def test_alpha_bar_is_that_of_stable_diffusion() -> None:
    timesteps = torch.tensor([0, 1, 100, 300, 500, 750, 999])
    expected = torch.tensor([0.99915, 0.998296, 0.89422, 0.59050, 0.276332, 0.05617, 0.0046601])
    assert torch.allclose(schedule.alpha_bar(timesteps), expected, atol=5e-6)


def test_the_last_noise_level_is_that_of_stable_diffusion() -> None:
    last = schedule.alpha_bar(999).item()
    assert ((1 - last) / last) ** 0.5 == pytest.approx(14.6146, abs=1e-3)  # k-diffusion's sigma_max for SD


def test_x0_from_residual_by_hand() -> None:
    z, prediction = torch.full((2, 4, 1, 1), 2.0), torch.full((2, 4, 1, 1), 0.5)
    x0 = schedule.x0_from_residual(z, prediction, torch.tensor([1, 500]))
    assert x0[0, 0].item() == pytest.approx(2 / 0.998296**0.5 - 0.5, abs=1e-5)
    assert x0[1, 0].item() == pytest.approx(2 / 0.276332**0.5 - 0.5, abs=1e-5)


def test_noise_added_is_noise_removed() -> None:
    generator = torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    timesteps = torch.tensor([0, 400, 999])
    z_t = schedule.add_noise(z0, noise, timesteps)
    assert torch.allclose(schedule.x0_from_noise(z_t, noise, timesteps), z0, atol=1e-5)


def test_teacher_timestep_truncates_and_clamps() -> None:
    students = torch.tensor([1, 41, 999])
    assert schedule.teacher_timestep(students).tolist() == [0, 20, 499]
    assert schedule.teacher_timestep(students, lam=1.0, gamma=100).tolist() == [101, 141, 999]


@pytest.mark.parametrize("timestep", [0, 1000, -5, 1.5])
def test_timesteps_outside_the_range_are_named(timestep: float) -> None:
    with pytest.raises(ValueError, match=rf"timestep is {timestep}; accepted are the integers 1\.\.999"):
        schedule.check_timestep(timestep)  # type: ignore[arg-type]
