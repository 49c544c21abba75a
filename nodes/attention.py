"""Attention on a processor: torch's own, which is faster there than what ComfyUI chooses (docs/performance.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.model import vae_attention
from torch import Tensor

from ..tadsr.encoder import Attend, attend

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def encoder_attention(device: torch.device) -> Attend:
    """Returns the attention for the encoder: on a processor torch's, elsewhere the one that ComfyUI uses in VAEs."""
    return attend if mm.is_device_cpu(device) else vae_attention()


def prefer_torch_attention(model: ModelPatcher) -> None:
    """Makes a UNet on the processor use torch's attention where ComfyUI would choose by itself.

    The user's choice (--use-split-cross-attention and the like) and that of another node, later, stand.
    """
    if mm.is_device_cpu(model.load_device) and attention.optimized_attention is attention.attention_sub_quad:
        model.model_options["transformer_options"]["optimized_attention_override"] = _torch_attention


def _torch_attention(chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention.attention_pytorch(*args, **kwargs)
