"""The tagger under ComfyUI's memory management."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...tadsr.tagger import Tagger
from ...tadsr.tagger_input import tagger_input
from ...tadsr.tagger_weights import TaggerWeights, load
from ..compat import device_context
from .folders import file_identity


class TaggerModel:
    """The network with its tags, and its `patcher`. Weights are kept as they are in the file, in float16."""

    def __init__(self, weights: TaggerWeights) -> None:
        self.tags = weights.tags
        # As ComfyUI places CLIP Vision, a network for pictures of about this size.
        self.device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
        self.dtype = torch.float16 if mm.should_use_fp16(self.device) else torch.float32
        self.model = Tagger(
            weights.config, operations=comfy.ops.manual_cast, device=offload_device, dtype=torch.float16
        ).eval()
        self.model.requires_grad_(False)
        mm.archive_model_dtypes(self.model)
        # Looked up at call time: ComfyUI replaces CoreModelPatcher when it starts with dynamic VRAM.
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.model, load_device=self.device, offload_device=offload_device
        )
        self.model.load_state_dict(weights.state, assign=self.patcher.is_dynamic())

    def tags_of(self, planes: Tensor, size: tuple[int, int]) -> list[str]:
        """Returns the picture's tags, in the order of the list.

        planes: (1, 3, H, W) in [0, 1]; size: (height, width) that it is looked at, at least its own.
        """
        image = tagger_input(planes, size, self.model.config.side)
        logits = self._logits(image, self.dtype)
        if not logits.isfinite().all():  # half precision overflowed
            logits = self._logits(image, torch.float32)
        return self.tags.given(logits)[0]

    def _logits(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        memory = self.model.memory_used(len(image), mm.dtype_size(dtype))
        mm.load_models_gpu([self.patcher], memory_required=memory)
        with device_context(self.device):
            return self.model(image.to(self.device, dtype))


def load_tagger(path: str) -> TaggerModel:
    """Returns the tagger in a file, the one of the latest call if the file is still the same; raises WeightsError."""
    return _load(path, file_identity(path))


@lru_cache(maxsize=1)
def _load(path: str, _: str) -> TaggerModel:
    return TaggerModel(load(Path(path)))
