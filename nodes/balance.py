"""The node Balance PiSA-SR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .checks import checked
from .inputs import CATEGORY
from .models.balance import MAX_SHARE, balanced

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class TADSRPiSABalance(io.ComfyNode):
    """MODEL of PiSA-SR -> MODEL with two dials."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSRPiSABalance",
            display_name="Balance PiSA-SR",
            category=CATEGORY,
            description="Sets how much PiSA-SR changes pixels (noise, blur) and semantics (new detail). At 1 and 1, or "
            "with no semantics, it takes one evaluation of the network; otherwise two.",
            search_aliases=["pisa-sr", "pisasr", "pixel semantic", "lambda_pix", "lambda_sem"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load TADSR Model, of PiSA-SR weights."),
                _share_input("pixel", "Removal of noise and blur: lambda_pix of PiSA-SR."),
                _share_input("semantic", "Detail that the model adds: lambda_sem of PiSA-SR."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with these two dials, for Upscale with TADSR or One-Step SR.")],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, pixel: float = 1.0, semantic: float = 1.0) -> io.NodeOutput:
        return io.NodeOutput(balanced(model, pixel, semantic))


def _share_input(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=1.0, min=0.0, max=MAX_SHARE, step=0.05, round=False, tooltip=f"{tooltip} 1: as trained."
    )
