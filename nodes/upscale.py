"""The node Upscale with TADSR."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE
from .encode import draw_seed
from .inputs import (
    CATEGORY,
    ENCODINGS,
    Encoder,
    any_timestep_input,
    color_match_input,
    encoding_inputs,
    exact_size_inputs,
    image_input,
    preview_size_input,
    scale_input,
    tile_inputs,
    timestep_input,
)
from .models.encoder import TimeAwareEncoderModel
from .models.student import Conditioning, choose_conditioning, student_of
from .running.color import centre_region
from .running.pictures import check_image, result_size
from .running.plan import plan_upscale
from .running.progress import Progress
from .running.stages import decoder_network, encoder_network, may_be_cut, prediction_network
from .running.upscaling import Upscaling

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher


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
                *("upscale", "upscaler", "upscale image", "upscale photo", "image upscale", "enlarge image"),
                *("2x", "4x", "8x", "4k", "super resolution", "super-resolution", "sr", "tadsr", "one step"),
                *("restore", "photo restoration", "enhance", "sharpen", "deblur", "denoise", "unblur"),
                *("high resolution", "hires", "old photo", "jpeg artefacts"),
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
                *tile_inputs(),
                preview_size_input(),
                any_timestep_input(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        encoder: TimeAwareEncoderModel,
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
        tile: int = 0,
        overlap: int = 0,
        preview_size: int = 0,
        any_timestep: bool = False,
    ) -> io.NodeOutput:
        timestep = student_of(model).timestep(timestep, any_timestep=any_timestep)
        encoder.timestep(timestep, any_timestep=any_timestep)
        size = result_size(check_image(image), scale, width, height)
        wanted = centre_region(size, preview_size)
        conditioning = choose_conditioning(model, conditioning)
        plan = plan_upscale(model, encoder, vae, size, tile, overlap, not may_be_cut(conditioning))
        work = Upscaling(
            plan=plan,
            networks=(
                encoder_network(encoder, timestep),
                prediction_network(model, timestep, conditioning),
                decoder_network(vae),
            ),
            progress=Progress(plan.phases, len(image)),
            wanted=wanted,
        )
        latents = [work.encode(picture, draw_seed(encoding, seed, index)) for index, picture in enumerate(image)]
        latents = [work.predict(latent) for latent in latents]
        results = [work.decode(latent, picture, color_match) for picture, latent in zip(image, latents, strict=True)]
        return io.NodeOutput(results[0] if len(results) == 1 else torch.cat(results))
