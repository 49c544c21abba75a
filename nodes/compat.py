"""What older supported versions of ComfyUI lack."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from torch import Tensor

if TYPE_CHECKING:
    import comfy.sd

# In the texts of torch's plain RuntimeErrors: of MPS, of its CPU allocator on Linux and macOS, and on Windows.
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def intermediate_dtype() -> torch.dtype:
    """Returns the dtype of tensors between nodes. ComfyUI 0.16 has no such setting: float32."""
    return mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32


def device_context(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which `device` is the current CUDA device; ComfyUI up to 0.20 has none."""
    return mm.cuda_device_context(device) if hasattr(mm, "cuda_device_context") else nullcontext()


def ensure_own_decoder(vae: comfy.sd.VAE, config: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Rebuilds the VAE's decoder by `config` where ComfyUI gave it the encoder's, as 0.16 does.

    state: the VAE's tensors, those of the decoder as `decoder.*`.
    """
    wanted = {key.removeprefix("decoder."): tensor for key, tensor in state.items() if key.startswith("decoder.")}
    if set(vae.first_stage_model.decoder.state_dict()) == set(wanted):
        return
    decoder = Decoder(**config).eval().to(vae.vae_dtype)
    mm.archive_model_dtypes(decoder)
    decoder.load_state_dict(wanted, strict=False, assign=vae.patcher.is_dynamic())
    vae.first_stage_model.decoder = decoder
    vae.size = None  # computed again when asked for


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether the error means that memory ran out: ComfyUI knows that of GPUs, and 0.16 not all of it."""
    if mm.is_oom(error) if hasattr(mm, "is_oom") else isinstance(error, mm.OOM_EXCEPTION):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def run_eagerly() -> AbstractContextManager[None]:
    """Returns a context in which a network compiled by TorchCompileModel runs as it was written, from torch 2.6 on.

    Older torch has no means for it: there SharedContext raises RuntimeError where it meets a compiled network.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
