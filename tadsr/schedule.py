"""Diffusion schedule of Stable Diffusion 2.1-base, and the formulas of TADSR that rest on it.

Every function takes a timestep as an int, or as an integer tensor of shape () or (B,) with values 0..999, and
broadcasts it over latents of shape (B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # SD 2.1-base scheduler config
BETA_START, BETA_END = 0.00085, 0.012  # SD 2.1-base scheduler config, "scaled_linear"
LATENT_SCALE = 0.18215  # SD VAE config, scaling_factor: z = latent * LATENT_SCALE
MIN_TIMESTEP, MAX_TIMESTEP = 1, 999  # the timesteps that a student is trained on
DEFAULT_TIMESTEP = 500  # paper, table 1
OWN_TIMESTEP = 0  # stands for the timestep of the weights themselves
TEACHER_LAMBDA, TEACHER_GAMMA = 0.5, 0.0  # paper, section 4.1


@lru_cache(maxsize=1)
def _alpha_bar_table() -> tuple[float, ...]:
    """Returns the cumulative products of 1 - beta, one per timestep, computed in float64."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return tuple(torch.cumprod(1 - betas, dim=0).tolist())


def alpha_bar(timestep: int | Tensor) -> Tensor:
    """Returns the cumulative signal variance at `timestep`, float32, of the timestep's shape and device."""
    timestep = torch.as_tensor(timestep)
    table = torch.tensor(_alpha_bar_table(), dtype=torch.float32, device=timestep.device)
    return table[timestep.long()]


def _alpha_bar_like(timestep: int | Tensor, latent: Tensor) -> Tensor:
    """Returns alpha_bar on the latent's device, shaped to broadcast over (B, C, H, W)."""
    return alpha_bar(timestep).to(latent.device).reshape(-1, 1, 1, 1)


def x0_from_residual(z: Tensor, prediction: Tensor, timestep: int | Tensor) -> Tensor:
    """Returns the student's clean latent, z / sqrt(alpha_bar_t) - prediction.

    z, prediction: (B, C, H, W), scaled latents. The prediction is a residual, not epsilon.
    Source: behaviour of the released student; the paper writes z_hat = F(z_L, t_s).
    """
    return z / _alpha_bar_like(timestep, z).sqrt() - prediction


def x0_from_noise(z_t: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
    """Returns the clean latent of an epsilon prediction, (z_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)."""
    a = _alpha_bar_like(timestep, z_t)
    return (z_t - (1 - a).sqrt() * noise) / a.sqrt()


def x0_from_difference(z: Tensor, prediction: Tensor, timestep: int | Tensor) -> Tensor:
    """Returns the clean latent of a network that predicts what to take away, z - prediction, at any timestep.

    Source: behaviour of the released PiSA-SR.
    """
    return z - prediction


FORMULAS: dict[str, Callable[[Tensor, Tensor, int | Tensor], Tensor]] = {
    "residual": x0_from_residual,  # TADSR
    "noise": x0_from_noise,  # OSEDiff, OMGSR, HYPIR
    "difference": x0_from_difference,  # PiSA-SR
}


def add_noise(z0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
    """Returns z_t = sqrt(alpha_bar) z0 + sqrt(1 - alpha_bar) eps (paper, equation 3)."""
    a = _alpha_bar_like(timestep, z0)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def teacher_timestep(timestep: Tensor, lam: float = TEACHER_LAMBDA, gamma: float = TEACHER_GAMMA) -> Tensor:
    """Returns t_v = lambda t_s + gamma (paper, equation 5), truncated to an integer and clamped to 0..999."""
    return (timestep * lam + gamma).long().clamp(0, NUM_TIMESTEPS - 1)


def timestep_grid(count: int) -> tuple[int, ...]:
    """Returns `count` integers evenly spaced over 1..999, truncated; 0: all of them.

    The released weights were trained on 50 of them; the paper says uniform.
    """
    if count == 0:
        return tuple(range(MIN_TIMESTEP, MAX_TIMESTEP + 1))
    if count == 1:
        return (MIN_TIMESTEP,)
    return tuple(MIN_TIMESTEP + i * (MAX_TIMESTEP - MIN_TIMESTEP) // (count - 1) for i in range(count))


def choose_timestep(timestep: int, trained: Sequence[int], name: str, *, any_timestep: bool = False) -> int:
    """Returns the timestep to run weights at: the one given, or for OWN_TIMESTEP the weights' own.

    trained: the timesteps that the weights, called `name`, were trained for; empty: all. Their own is the only one, or
    the paper's of all. Raises ValueError for another than the only one unless `any_timestep`.
    """
    only = trained[0] if len(trained) == 1 else None
    if timestep == OWN_TIMESTEP:
        return DEFAULT_TIMESTEP if only is None else only
    if only not in (None, check_timestep(timestep)) and not any_timestep:
        raise ValueError(
            f"timestep is {timestep}, but {name} was trained for timestep {only} only; accepted are {only} and "
            f"{OWN_TIMESTEP} (the weights' own), or any with any_timestep switched on"
        )
    return check_timestep(timestep)


def check_timestep(timestep: int) -> int:
    """Returns the timestep unchanged; raises ValueError unless it is an integer in 1..999."""
    number = isinstance(timestep, int | float) and not isinstance(timestep, bool) and math.isfinite(timestep)
    if not number or int(timestep) != timestep or not MIN_TIMESTEP <= timestep <= MAX_TIMESTEP:
        raise ValueError(
            f"timestep is {timestep}; accepted are the integers {MIN_TIMESTEP}..{MAX_TIMESTEP} "
            f"(low: faithful to the input, high: more invented detail)"
        )
    return int(timestep)
