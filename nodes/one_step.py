"""The node One-Step SR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tadsr.schedule import MAX_TIMESTEP, MIN_TIMESTEP, OWN_TIMESTEP
from .checks import checked
from .compat import intermediate_dtype
from .encode import TIMESTEPS_KEY
from .inputs import CATEGORY, any_timestep_input, tile_inputs
from .models.student import Conditioning, choose_conditioning, student_of
from .running.batch import collected
from .running.pictures import StageData
from .running.plan import plan_latent
from .running.progress import Progress
from .running.run import Run
from .running.stages import prediction_stage

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class TADSROneStep(io.ComfyNode):
    """MODEL, LATENT -> LATENT, by one evaluation of the network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSROneStep",
            display_name="One-Step SR",
            category=CATEGORY,
            description="Restores detail in the latent with one step of the student. Decode its result with "
            "the VAE, then use Match Colour and Size.",
            search_aliases=["tadsr sampler", "one step super resolution"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load TADSR Model; LoRA and other patches work on it."),
                io.Latent.Input("latent", tooltip="From Time-Aware Encode."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A description of the picture. Unconnected: the default prompt of the weights.",
                ),
                io.Int.Input(
                    "timestep",
                    optional=True,
                    min=OWN_TIMESTEP,
                    max=MAX_TIMESTEP,
                    force_input=True,
                    tooltip="Unconnected: the timestep that the latent was encoded for, as trained.",
                ),
                *tile_inputs(),
                any_timestep_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The restored latent, for any VAE decode node.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        latent: dict[str, Any],
        conditioning: Conditioning | None = None,
        timestep: int | None = None,
        tile: int = 0,
        overlap: int = 0,
        any_timestep: bool = False,
    ) -> io.NodeOutput:
        student = student_of(model)
        samples, mask = checked_samples(latent, model), noise_mask_of(latent)
        timesteps = tuple(
            student.timestep(one, any_timestep=any_timestep) for one in choose_timesteps(latent, timestep)
        )
        stage = prediction_stage(model, choose_conditioning(model, conditioning), is_masked=mask is not None)
        plan = plan_latent(stage, *samples.shape[-2:], tile=tile, overlap=overlap)
        run = Run(plan, Progress(plan, len(samples)))
        source = samples if mask is None else torch.cat([samples, mask.to(samples)], dim=1)
        results = (
            run.predict(StageData(sample, timestep=sample_timestep)).full.to(
                device=mm.intermediate_device(), dtype=intermediate_dtype()
            )
            for sample, sample_timestep in zip(source.split(1), timesteps, strict=True)
        )
        return io.NodeOutput({**latent, "samples": collected(results, len(samples)), TIMESTEPS_KEY: timesteps})


def checked_samples(latent: dict[str, Any], model: ModelPatcher) -> Tensor:
    """Returns a LATENT's samples (B, C, h, w). Raises ValueError where they are not of the MODEL's kind."""
    samples, channels = latent["samples"], model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"this LATENT has {samples.shape[1]} channels, shape {tuple(samples.shape)}; accepted by this MODEL are "
            f"{channels}, from Time-Aware Encode with the ENCODER of the same weights"
        )
    return samples


def noise_mask_of(latent: dict[str, Any]) -> Tensor | None:
    """Returns the mask of Set Latent Noise Mask at the latent's size, (B, 1, h, w), or None. Raises ValueError."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim < 2 or 0 in mask.shape or not mask.float().isfinite().all():
        seen = (
            f"the shape {tuple(mask.shape)}, or NaN" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        )
        raise ValueError(f"this LATENT's noise_mask has {seen}; accepted are masks (batch, 1, height, width) in 0..1")
    return comfy.utils.reshape_mask(mask.float(), torch.Size((len(samples), 1, *samples.shape[-2:]))).to(samples.device)


def choose_timesteps(latent: dict[str, Any], timestep: int | None) -> tuple[int, ...]:
    """Returns a timestep per picture: the one given, or those the latent remembers. Raises ValueError."""
    count = len(latent["samples"])
    if timestep is not None:
        return (timestep,) * count
    remembered = latent.get(TIMESTEPS_KEY)
    if remembered is None:
        raise ValueError(
            "this LATENT does not say for which timestep it was encoded; accepted is the LATENT of "
            f"Time-Aware Encode, or another one with a timestep of {MIN_TIMESTEP}..{MAX_TIMESTEP} connected"
        )
    if not isinstance(remembered, list | tuple) or not remembered or not all(type(one) is int for one in remembered):
        raise ValueError(
            f"this LATENT's {TIMESTEPS_KEY} is {str(remembered)[:80]}; accepted are whole numbers, one for each "
            "picture: connect the timestep"
        )
    if len(set(remembered)) == 1:
        return (remembered[0],) * count
    if len(remembered) != count:
        raise ValueError(
            f"this LATENT has {count} pictures and {len(remembered)} different timesteps, as a node between "
            "changed its batch; accepted is one timestep for each picture: connect the timestep"
        )
    return tuple(remembered)
