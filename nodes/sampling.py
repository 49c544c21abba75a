"""The student's parameterisation and its one step, through ComfyUI's own samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..tadsr.schedule import check_timestep

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Conditioning = list[list[Any]]  # ComfyUI's CONDITIONING


class ResidualPrediction(comfy.model_sampling.EPS):
    """x0 = z / sqrt(alpha_bar) - prediction.

    ComfyUI's noisy sample is x = z / sqrt(alpha_bar) = z * sqrt(sigma^2 + 1), and it hands the network
    x / sqrt(sigma^2 + 1) = z. So a latent enters multiplied by sqrt(sigma^2 + 1), and x0 = x - prediction.
    """

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - model_output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        # TADSR adds no noise: a core sampler's seed makes no difference.
        return latent_image * (comfy.model_sampling.reshape_sigma(sigma, noise.ndim) ** 2 + 1.0) ** 0.5


class ResidualSampling(comfy.model_sampling.ModelSamplingDiscrete, ResidualPrediction):
    """The `model_sampling` object of a student: SD's schedule with a residual prediction."""


def one_step(model: ModelPatcher, latent: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
    """Returns the clean latent: one Euler step from sigma(timestep) to 0, without noise or guidance.

    latent: (B, C, h, w), as other nodes have it (not multiplied by 0.18215).
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.stack([sampling.sigmas[check_timestep(timestep)].cpu(), torch.tensor(0.0)])
    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent),
        1.0,
        comfy.samplers.ksampler("euler"),
        sigmas,
        conditioning,
        conditioning,
        latent,
        disable_pbar=True,
        seed=0,
    )
