"""The student: an SD 2.1 MODEL with merged weights, its method's formula, its one step and default prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...tadsr.color import DEFAULT_COLOR_MATCH
from ...tadsr.errors import WeightsError
from ...tadsr.lora import Adapter, adapters, merge
from ...tadsr.schedule import check_timestep, choose_timestep
from ...tadsr.weights import TadsrWeights, check_against_base, unet_adapters
from ..compat import prefer_torch_attention
from .sampling_advice import advise_on_sampling

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


Conditioning = list[list[Any]]  # ComfyUI's CONDITIONING
STUDENT_KEY = "tadsr_student"  # the attachment of a MODEL that makes it a student


@dataclass(frozen=True)
class Student:
    """What a student MODEL carries beside its weights."""

    weights_name: str
    prompt: Tensor | None  # (1, tokens, width): the embedding used without a CONDITIONING
    timesteps: tuple[int, ...] = ()  # those that the weights were trained for; empty: all
    color_match: str = DEFAULT_COLOR_MATCH  # what suits the weights' results
    semantic: Mapping[str, Adapter] = field(default_factory=dict)  # of PiSA-SR: merged, and known to be taken away

    def timestep(self, timestep: int, *, any_timestep: bool = False) -> int:
        """Returns the timestep to run at; raises ValueError for one that the weights were not trained for."""
        return choose_timestep(timestep, self.timesteps, self.weights_name, any_timestep=any_timestep)


def make_student(
    base: ModelPatcher, weights: TadsrWeights, weights_name: str, prompt: Tensor | None = None
) -> ModelPatcher:
    """Returns `base` with a method's weights merged into its network. Raises WeightsError if they need another base.

    prompt: the default prompt's embedding, where the weights have none.

    Merged here, once, rather than patched: ComfyUI keeps a copy of each patched weight, and computes the patches of
    a network that does not fit on the device again in every call.
    """
    if base.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        raise WeightsError(
            f"{weights_name} needs Stable Diffusion 2.1-base (512 pixels, epsilon prediction); the chosen "
            "checkpoint predicts v, as Stable Diffusion 2.1 for 768 pixels does. Choose v2-1_512-ema-pruned "
            "or its equal"
        )
    check_against_base(weights, {key: tensor.shape for key, tensor in base.model_state_dict().items()})
    _merge_weights(base, weights)
    base.add_object_patch("model_sampling", SAMPLINGS[weights.metadata.formula](base.model.model_config))
    prefer_torch_attention(base)
    advise_on_sampling(base)
    student = Student(
        weights_name=weights_name,
        prompt=prompt if weights.prompt is None else weights.prompt,
        timesteps=weights.metadata.timesteps,
        color_match=weights.metadata.color_match,
        semantic={
            module: Adapter(adapter.down.clone(), adapter.up.clone(), adapter.alpha)  # not views of a file
            for module, adapter in adapters(weights.unet_lora_semantic).items()
        },
    )
    base.set_attachments(STUDENT_KEY, student)
    return base


def _merge_weights(base: ModelPatcher, weights: TadsrWeights) -> None:
    """Replaces the network's tensors one by one, so that no second network is held."""
    # Replaced tensors come first: the LoRA of such a module is added to the new tensor.
    for key, tensor in weights.unet_full.items():
        comfy.utils.set_attr_param(base.model, key, tensor.to(comfy.utils.get_attr(base.model, key), copy=True))
    for module, adapter in unet_adapters(weights):
        key = f"{module}.weight"
        weight = comfy.utils.get_attr(base.model, key)
        down, up = adapter.down.to(weight.device), adapter.up.to(weight.device)
        comfy.utils.set_attr_param(base.model, key, merge(weight, down, up, adapter.scale))


def student_of(model: ModelPatcher) -> Student:
    """Returns what the MODEL carries; raises ValueError if it is no student, or its sampling was replaced."""
    student = model.get_attachment(STUDENT_KEY)
    if student is None:
        raise ValueError(
            f"this MODEL is a {type(model.model).__name__} without TADSR weights; accepted is the MODEL "
            "output of Load TADSR Model"
        )
    if not isinstance(model.get_model_object("model_sampling"), StudentSampling):
        raise ValueError(
            "another node has replaced the sampling of this TADSR MODEL (as ModelSamplingDiscrete does); "
            "connect the MODEL without that node"
        )
    return student


def choose_conditioning(model: ModelPatcher, conditioning: Conditioning | None) -> Conditioning:
    """Returns the CONDITIONING given, or the weights' default prompt. Raises ValueError if neither fits."""
    student = student_of(model)
    if conditioning is None:
        if student.prompt is None:
            raise ValueError(
                f"{student.weights_name} holds no default prompt: connect a CONDITIONING, from CLIP Text "
                "Encode with the CLIP of Load TADSR Model (an empty text will do)"
            )
        return default_conditioning(student.prompt)
    context_width = model.model.model_config.unet_config["context_dim"]
    for embedding, _ in conditioning:
        if embedding.shape[-1] != context_width:
            raise ValueError(
                f"the CONDITIONING is {embedding.shape[-1]} wide; accepted by this MODEL is {context_width}. "
                "Encode the text with the CLIP of Load TADSR Model, or leave the conditioning unconnected"
            )
    return conditioning


def default_conditioning(prompt: Tensor) -> Conditioning:
    """Returns a prompt embedding as ComfyUI's CONDITIONING."""
    return [[prompt.float(), {}]]


class StudentSampling(comfy.model_sampling.ModelSamplingDiscrete):
    """The `model_sampling` object of a student: SD's schedule, a latent without noise, its method's formula.

    ComfyUI's noisy sample is x = z / sqrt(alpha_bar) = z * sqrt(sigma^2 + 1), and it hands the network
    x / sqrt(sigma^2 + 1) = z. So a latent enters multiplied by sqrt(sigma^2 + 1).
    """

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        # No method adds noise: a core sampler's seed makes no difference.
        return latent_image * _growth(sigma, noise)


class ResidualSampling(StudentSampling, comfy.model_sampling.EPS):
    """TADSR: x0 = z / sqrt(alpha_bar) - prediction = x - prediction."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - model_output


class NoiseSampling(StudentSampling, comfy.model_sampling.EPS):
    """OSEDiff, OMGSR, HYPIR: x0 = (z - sqrt(1 - alpha_bar) prediction) / sqrt(alpha_bar), ComfyUI's own formula."""


class DifferenceSampling(StudentSampling, comfy.model_sampling.EPS):
    """PiSA-SR: x0 = z - prediction."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input / _growth(sigma, model_input) - model_output


SAMPLINGS: dict[str, type[StudentSampling]] = {  # a name of `tadsr.schedule.FORMULAS`
    "residual": ResidualSampling,
    "noise": NoiseSampling,
    "difference": DifferenceSampling,
}


def _growth(sigma: Tensor, like: Tensor) -> Tensor:
    """Returns sqrt(sigma^2 + 1), shaped to broadcast over a latent."""
    return (comfy.model_sampling.reshape_sigma(sigma, like.ndim) ** 2 + 1.0) ** 0.5


def one_step(
    model: ModelPatcher,
    latent: Tensor,
    timestep: int,
    conditioning: Conditioning,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """Returns the clean latent: one Euler step from sigma(timestep) to 0, without noise or guidance.

    latent: (B, C, h, w), as other nodes have it (not multiplied by 0.18215). noise_mask: (B, 1, h, w) in [0, 1]; where
    it is 0, core keeps the latent as it was.
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
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=0,
    )
