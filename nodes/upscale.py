"""The node Upscale with TADSR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE
from .checks import checked
from .encode import draw_seed
from .inputs import (
    AUTOMATIC,
    CATEGORY,
    ENCODINGS,
    any_timestep_input,
    color_strength_input,
    conditioning_input,
    encoding_inputs,
    exact_size_inputs,
    image_input,
    kept_proportions_inputs,
    model_inputs,
    preview_place_inputs,
    preview_size_input,
    scale_input,
    tile_inputs,
    timestep_input,
    weights_color_match_input,
)
from .models.encoder import TimeAwareEncoderModel
from .models.student import Conditioning, choose_conditioning, student_of
from .running.batch import BatchMemory, collected
from .running.color import ColorMatch
from .running.kept import keeping, recall, run_key
from .running.pictures import check_image, enlarge_picture, result_size
from .running.place import preview_region
from .running.plan import plan_upscale
from .running.progress import Progress
from .running.run import Run
from .running.stages import upscale_stages

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
                *model_inputs(),
                image_input(),
                timestep_input(),
                scale_input(),
                weights_color_match_input(),
                conditioning_input(),
                *exact_size_inputs(),
                *encoding_inputs(),
                *tile_inputs(),
                preview_size_input(),
                # Saved workflows hold values by place: what is new comes last.
                any_timestep_input(),
                *kept_proportions_inputs(),
                color_strength_input(),
                *preview_place_inputs(),
            ],
            outputs=[io.Image.Output(tooltip="The result, or the part of it that the preview shows.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        encoder: TimeAwareEncoderModel,
        vae: comfy.sd.VAE,
        image: Tensor,
        timestep: int,
        scale: float = DEFAULT_SCALE,
        color_match: str = AUTOMATIC,
        conditioning: Conditioning | None = None,
        width: int = 0,
        height: int = 0,
        encoding: str = ENCODINGS[0],
        seed: int = 0,
        tile: int = 0,
        overlap: int = 0,
        preview_size: int = 0,
        any_timestep: bool = False,
        longest_side: int = 0,
        shortest_side: int = 0,
        megapixels: float = 0.0,
        color_strength: float = 1.0,
        preview_x: float = 0.5,
        preview_y: float = 0.5,
        preview_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        student = student_of(model)
        timestep = student.timestep(timestep, any_timestep=any_timestep)
        encoder.timestep(timestep, any_timestep=any_timestep)
        match = ColorMatch(student.color_match if color_match == AUTOMATIC else color_match, color_strength)
        size = result_size(check_image(image), scale, width, height, longest_side, shortest_side, megapixels)
        wanted = preview_region(size, preview_size, (preview_x, preview_y), preview_mask)
        stages = upscale_stages(model, encoder, vae, choose_conditioning(model, conditioning))
        batch = BatchMemory(size, len(image), image.shape[-1], wanted)
        batch.check()
        plan = plan_upscale(stages, size, tile, overlap, pictures=batch.bytes)
        run = Run(plan, Progress(plan, len(image)), wanted)
        key = run_key(
            (encoder, vae, image, conditioning),
            (timestep, size, encoding, seed, wanted, *(planned.tiles for planned in plan.stages))
            + tuple(stage.patcher.patches_uuid for stage in stages),
        )
        decoded = recall(model, key)
        if decoded is None:  # more than colours has changed
            # Each stage runs over the whole batch, so that its network is loaded once.
            latents = [
                run.encode(enlarge_picture(picture, size), timestep, draw_seed(encoding, seed, index))
                for index, picture in enumerate(image)
            ]
            latents = [run.predict(latent) for latent in latents]
            decoded = keeping(model, key, map(run.decode, latents, image))
        results = (run.finish(one, picture, match) for one, picture in zip(decoded, image, strict=True))
        return io.NodeOutput(collected(results, len(image)))
