"""The node Match Colour and Size."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from .checks import checked
from .inputs import CATEGORY, color_match_input, color_strength_input
from .running.batch import Collected
from .running.color import ColorMatch, finish
from .running.pictures import check_image, to_bchw, to_image


class TADSRFinish(io.ComfyNode):
    """IMAGE, reference IMAGE -> IMAGE of the reference's size, colours and alpha."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TADSRFinish",
            display_name="Match Colour and Size",
            category=CATEGORY,
            description="Cuts the decoded picture to the exact size of the enlarged input, gives it the "
            "colours of the input, and puts its alpha back.",
            search_aliases=["tadsr finish", "color match", "colour fix", "adain", "wavelet"],
            inputs=[
                io.Image.Input("image", tooltip="The decoded result."),
                io.Image.Input("reference", tooltip="The enlarged image of Time-Aware Encode."),
                color_match_input(),
                color_strength_input(),
            ],
            outputs=[io.Image.Output(tooltip="The result at its exact size, in the colours of the reference.")],
        )

    @classmethod
    @checked
    def execute(cls, image: Tensor, reference: Tensor, color_match: str, color_strength: float = 1.0) -> io.NodeOutput:
        match = ColorMatch(color_match, color_strength)
        check_image(image)
        check_image(reference, "reference")
        if len(reference) not in (1, len(image)):
            raise ValueError(
                f"the reference has {len(reference)} pictures and the image {len(image)}; accepted are one "
                "reference for all, or one for each"
            )
        progress = comfy.utils.ProgressBar(len(image))
        results = Collected(len(image))
        for index, picture in enumerate(image):
            mm.throw_exception_if_processing_interrupted()
            enlarged = to_bchw(reference[index % len(reference)])
            results.add(to_image(finish(to_bchw(picture), enlarged, match)))
            progress.update(1)
        return io.NodeOutput(results.whole)
