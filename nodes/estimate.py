"""The node Estimate TADSR Upscale."""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui
from server import PromptServer
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE
from .checks import checked
from .inputs import (
    CATEGORY,
    exact_size_inputs,
    image_input,
    kept_proportions_inputs,
    model_inputs,
    scale_input,
    tile_inputs,
)
from .models.encoder import TimeAwareEncoderModel
from .models.student import default_conditioning
from .running.batch import BatchMemory
from .running.forecast import Forecast
from .running.memory import MEGABYTE
from .running.pictures import check_image, result_size
from .running.plan import plan_upscale
from .running.stages import upscale_stages

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

PLAIN_PROMPT = default_conditioning(torch.zeros(1, 1, 1))  # its words make no difference to tiles and memory


class TADSREstimate(io.ComfyNode):
    """IMAGE -> what upscaling it will take; no network runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSREstimate",
            display_name="Estimate TADSR Upscale",
            category=CATEGORY,
            description="Says what Upscale with TADSR would take for the same image, size and tiles and one plain "
            "prompt, before it runs: size, tiles, memory, time on this machine, and whether it fits. Runs no network.",
            search_aliases=["tadsr estimate", "tadsr vram", "upscale time", "tile plan"],
            is_output_node=True,
            inputs=[
                *model_inputs(),
                image_input(),
                scale_input(),
                *exact_size_inputs(),
                *tile_inputs(),
                *kept_proportions_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Everything as text; it is shown on the node, too."),
                io.Int.Output(display_name="width", tooltip="Of the result, in pixels."),
                io.Int.Output(display_name="height", tooltip="Of the result, in pixels."),
                io.Int.Output(display_name="tiles", tooltip="Of one picture in all three stages together."),
                io.Float.Output(
                    display_name="memory_mb",
                    tooltip="At the peak on the networks' device: the weights and activations of one network.",
                ),
                io.Float.Output(
                    display_name="seconds",
                    tooltip="For the whole batch, roughly; 0 before the first run with this model.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        """Returns what differs every time: free memory and the known times change between runs."""
        return monotonic_ns()

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        encoder: TimeAwareEncoderModel,
        vae: comfy.sd.VAE,
        image: Tensor,
        scale: float = DEFAULT_SCALE,
        width: int = 0,
        height: int = 0,
        tile: int = 0,
        overlap: int = 0,
        longest_side: int = 0,
        shortest_side: int = 0,
        megapixels: float = 0.0,
    ) -> io.NodeOutput:
        size = result_size(check_image(image), scale, width, height, longest_side, shortest_side, megapixels)
        batch = BatchMemory(size, len(image), image.shape[-1])
        stages = upscale_stages(model, encoder, vae, PLAIN_PROMPT)
        forecast = Forecast(plan_upscale(stages, size, tile, overlap, pictures=batch.bytes), batch)
        report = forecast.report()
        # The page shows a node's `ui.text` only on core's Preview as Text, but this on any node.
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)
        return io.NodeOutput(
            report,
            size[1],
            size[0],
            forecast.tiles,
            forecast.peak_bytes / MEGABYTE,
            forecast.seconds or 0.0,
            ui=ui.PreviewText(report),
        )
