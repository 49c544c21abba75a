"""The node Blend Timesteps."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..tadsr.dial import mix_neighbours
from .checks import checked
from .inputs import CATEGORY
from .running.pictures import check_image


class TADSRBlend(io.ComfyNode):
    """The pictures of a sweep -> one between them, without a network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSRBlend",
            display_name="Blend Timesteps",
            category=CATEGORY,
            description="A dial that answers at once: mixes the two pictures of a sweep on either side of the "
            "position, pixel by pixel. No network runs. It is a mixture of two results, not the result of a timestep "
            "between.",
            search_aliases=["tadsr dial", "blend images", "strength", "fidelity", "interpolate", "mix", "crossfade"],
            inputs=[
                io.Image.Input("images", tooltip="The images of Sweep Timesteps: two or more, in order."),
                io.Float.Input(
                    "position",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0: the first picture, the most faithful. 1: the last, the sharpest.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture between the two neighbours.")],
        )

    @classmethod
    @checked
    def execute(cls, images: Tensor, position: float) -> io.NodeOutput:
        return io.NodeOutput(mix_neighbours(check_image(images, "images"), position))
