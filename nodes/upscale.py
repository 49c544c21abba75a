"""The node Upscale with TADSR."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE
from ..tadsr.schedule import check_timestep
from .encode import draw_seed
from .encoder_patcher import EncoderPatcher
from .images import check_image, to_image
from .phases import encode, enlarge_picture, finish, result_size
from .sampling import Conditioning, one_step
from .sockets import (
    CATEGORY,
    ENCODINGS,
    Encoder,
    color_match_input,
    encoding_inputs,
    exact_size_inputs,
    image_input,
    scale_input,
    timestep_input,
)
from .student import choose_conditioning

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

PHASES = 3  # encode, predict, decode: each runs over the whole batch, so that its network is loaded once


class TADSRUpscale(io.ComfyNode):
    """IMAGE -> IMAGE, all steps in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSRUpscale",
            display_name="Upscale with TADSR",
            category=CATEGORY,
            description="Upscales and restores photographs in one diffusion step; the timestep sets how "
            "faithful or how detailed the result is.",
            search_aliases=[
                "upscale",
                "super resolution",
                "restore",
                "enhance",
                "enlarge image",
                "tadsr",
                "sr",
            ],
            inputs=[
                io.Model.Input("model"),
                Encoder.Input("encoder"),
                io.Vae.Input("vae"),
                image_input(),
                timestep_input(),
                scale_input(),
                color_match_input(),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A description of the picture. Unconnected: the default prompt of the weights.",
                ),
                *exact_size_inputs(),
                *encoding_inputs(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        encoder: EncoderPatcher,
        vae: comfy.sd.VAE,
        image: Tensor,
        timestep: int,
        scale: float = DEFAULT_SCALE,
        color_match: str = "adain",
        conditioning: Conditioning | None = None,
        width: int = 0,
        height: int = 0,
        encoding: str = ENCODINGS[0],
        seed: int = 0,
    ) -> io.NodeOutput:
        check_timestep(timestep)
        size = result_size(check_image(image), scale, width, height)
        conditioning = choose_conditioning(model, conditioning)
        progress = comfy.utils.ProgressBar(PHASES * len(image))
        latents = []
        for index, picture in enumerate(image):
            mm.throw_exception_if_processing_interrupted()
            enlarged = enlarge_picture(picture, size)
            latents.append(encode(encoder, enlarged, timestep, draw_seed(encoding, seed, index)))
            progress.update(1)
        for index, latent in enumerate(latents):
            mm.throw_exception_if_processing_interrupted()
            latents[index] = one_step(model, latent, timestep, conditioning)
            progress.update(1)
        results = []
        for picture, latent in zip(image, latents, strict=True):
            mm.throw_exception_if_processing_interrupted()
            decoded = vae.decode(latent).movedim(-1, 1)
            # Enlarged again rather than kept: a long batch would hold every reference at once.
            results.append(to_image(finish(decoded, enlarge_picture(picture, size), color_match)))
            progress.update(1)
        return io.NodeOutput(torch.cat(results))
