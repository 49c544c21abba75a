"""What ComfyUI's versions lack, and the attention that is faster on a processor (docs/performance.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.model import Decoder, vae_attention
from torch import Tensor

from ..tadsr.encoder import Attend, attend

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher


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
