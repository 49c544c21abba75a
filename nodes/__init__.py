"""ComfyUI nodes of TADSR: the one list of nodes. Only this folder names ComfyUI's modules."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .balance import TADSRPiSABalance
from .blend import TADSRBlend
from .encode import TADSREncode
from .estimate import TADSREstimate
from .load_model import TADSRModelLoader
from .match import TADSRFinish
from .models.folders import register_weights_folder
from .one_step import TADSROneStep
from .prompt_from_image import TADSRPromptFromImage
from .sample import place_sample
from .twice import tell_second_copy
from .upscale import TADSRUpscale


class TADSRExtension(ComfyExtension):
    """The node pack, as ComfyUI sees it."""

    async def on_load(self) -> None:
        tell_second_copy(TADSRUpscale)
        register_weights_folder()
        place_sample()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TADSRModelLoader,
            TADSRUpscale,
            TADSREncode,
            TADSROneStep,
            TADSRFinish,
            TADSREstimate,
            TADSRBlend,
            TADSRPiSABalance,
            TADSRPromptFromImage,
        ]
