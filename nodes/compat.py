"""What older supported versions of ComfyUI lack."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import comfy.model_management as mm
import torch


def intermediate_dtype() -> torch.dtype:
    """Returns the dtype of tensors between nodes. ComfyUI 0.16 has no such setting: float32."""
    return mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32


def device_context(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which `device` is the current CUDA device; ComfyUI up to 0.20 has none."""
    return mm.cuda_device_context(device) if hasattr(mm, "cuda_device_context") else nullcontext()
