"""The node Time-Aware Encode."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE
from .checks import checked
from .inputs import (
    CATEGORY,
    ENCODINGS,
    MAX_SEED,
    any_timestep_input,
    encoder_input,
    encoding_inputs,
    exact_size_inputs,
    image_input,
    kept_proportions_inputs,
    scale_input,
    tile_inputs,
    timestep_input,
)
from .models.encoder import TimeAwareEncoderModel
from .running.batch import Collected
from .running.pictures import check_image, enlarge_picture, result_size, to_image
from .running.plan import plan_upscale
from .running.progress import Progress
from .running.run import Run
from .running.stages import encoder_stage

TIMESTEPS_KEY = "tadsr_timesteps"  # in a LATENT: the timestep that each of its pictures was encoded for


class TADSREncode(io.ComfyNode):
    """IMAGE -> LATENT for a timestep, and the enlarged IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSREncode",
            display_name="Time-Aware Encode",
            category=CATEGORY,
            description="Enlarges a picture and encodes it for one timestep. First of the four steps: "
            "encode, One-Step SR, VAE Decode, Match Colour and Size.",
            search_aliases=["tadsr encode", "time aware vae encoder"],
            inputs=[
                encoder_input(),
                image_input(),
                timestep_input(),
                scale_input(),
                *exact_size_inputs(),
                *encoding_inputs(),
                *tile_inputs(),
                any_timestep_input(),
                *kept_proportions_inputs(),
            ],
            outputs=[
                io.Latent.Output(tooltip="For One-Step SR; remembers the timestep."),
                io.Image.Output(
                    display_name="enlarged",
                    tooltip="The enlarged input: the reference of Match Colour and Size.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        encoder: TimeAwareEncoderModel,
        image: Tensor,
        timestep: int,
        scale: float = DEFAULT_SCALE,
        width: int = 0,
        height: int = 0,
        encoding: str = ENCODINGS[0],
        seed: int = 0,
        tile: int = 0,
        overlap: int = 0,
        any_timestep: bool = False,
        longest_side: int = 0,
        shortest_side: int = 0,
        megapixels: float = 0.0,
    ) -> io.NodeOutput:
        timestep = encoder.timestep(timestep, any_timestep=any_timestep)
        size = result_size(check_image(image), scale, width, height, longest_side, shortest_side, megapixels)
        plan = plan_upscale([encoder_stage(encoder)], size, tile, overlap)
        run = Run(plan, Progress(plan, len(image)))
        latents, pictures = Collected(len(image)), Collected(len(image))
        for index, picture in enumerate(image):
            enlarged = enlarge_picture(picture, size)
            latents.add(run.encode(enlarged, timestep, draw_seed(encoding, seed, index)).full)
            pictures.add(to_image(enlarged))
        latent = {"samples": latents.whole, TIMESTEPS_KEY: (timestep,) * len(image)}
        return io.NodeOutput(latent, pictures.whole)


def draw_seed(encoding: str, seed: int, index: int) -> int | None:
    """Returns the seed of picture `index` of a batch, or None where the mode is taken. Raises ValueError."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; accepted are 0..{MAX_SEED}")
    return None if encoding == "mode" else (seed + index) % 2**64
