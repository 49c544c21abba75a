"""The three networks as functions of a batch of tiles, under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from torch import Tensor, nn

from ...tadsr.tiling import Network
from ..compat import device_context
from ..models.encoder import TimeAwareEncoderModel
from ..models.student import Conditioning, one_step

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Entries of a CONDITIONING that belong to places in the whole picture, which a tile does not know.
PLACED = {"area", "mask", "control", "gligen", "concat_latent_image"}


def _unchanged(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True, kw_only=True)
class PhaseNetwork:
    """One of the networks, for one run: (n, C, h, w) -> (n, C', f h, f w)."""

    run: Network
    in_float32: Network | None  # the same in full precision; None where it already is
    module: nn.Module | None  # holds its GroupNorms, each called once a run; None where that is not known
    source_factor: int  # pixels of the source per latent pixel, along each side
    result_factor: int  # the same of the result
    tileable: bool = True
    finish: Network = _unchanged  # what the blended result still needs


def encoder_network(encoder: TimeAwareEncoderModel, timestep: int) -> PhaseNetwork:
    """Returns the encoder: RGB in [0, 1] -> moments of the latent."""

    def in_float32(planes: Tensor) -> Tensor:
        return encoder.moments(planes, timestep, float32=True)

    return PhaseNetwork(
        run=lambda planes: encoder.moments(planes, timestep),
        in_float32=None if encoder.dtype == torch.float32 else in_float32,
        module=encoder.model,
        source_factor=encoder.downscale,
        result_factor=1,
    )


def prediction_network(model: ModelPatcher, timestep: int, conditioning: Conditioning) -> PhaseNetwork:
    """Returns the student: latent -> clean latent. It runs in tiles only for a conditioning of one plain prompt."""

    def run(latent: Tensor) -> Tensor:
        return one_step(model, latent, timestep, conditioning)

    def in_float32(latent: Tensor) -> Tensor:
        base = model.model
        usual, base.manual_cast_dtype = base.manual_cast_dtype, torch.float32
        try:
            with _casting(base.diffusion_model):
                return run(latent)
        finally:
            base.manual_cast_dtype = usual

    return PhaseNetwork(
        run=run,
        in_float32=None if model.model.get_dtype_inference() == torch.float32 else in_float32,
        module=model.model.diffusion_model if may_be_cut(conditioning) else None,
        source_factor=1,
        result_factor=1,
        tileable=may_be_cut(conditioning),
    )


def may_be_cut(conditioning: Conditioning) -> bool:
    """Returns whether a tile can be predicted with the conditioning of the picture: one prompt, bound to no place."""
    return len(conditioning) == 1 and not PLACED & conditioning[0][1].keys()


def decoder_network(vae: comfy.sd.VAE) -> PhaseNetwork:
    """Returns the decoder: latent -> picture, RGB in [0, 1] once finished."""
    factor = int(vae.spacial_compression_decode())
    if not decodes_as_sd(vae):
        return PhaseNetwork(
            run=lambda latent: vae.decode(latent).movedim(-1, 1),
            in_float32=None,
            module=None,
            source_factor=1,
            result_factor=factor,
        )
    engine = vae.first_stage_model

    def decode(latent: Tensor, dtype: torch.dtype) -> Tensor:
        memory = vae.memory_used_decode(latent.shape, dtype)
        mm.load_models_gpu([vae.patcher], memory_required=memory, force_full_load=vae.disable_offload)
        with device_context(vae.device):
            return engine.decode(latent.to(device=vae.device, dtype=dtype)).float()

    def in_float32(latent: Tensor) -> Tensor:
        with _casting(engine):
            return decode(latent, torch.float32)

    return PhaseNetwork(
        run=lambda latent: decode(latent, vae.vae_dtype),
        in_float32=None if vae.vae_dtype == torch.float32 else in_float32,
        module=engine.decoder,
        source_factor=1,
        result_factor=factor,
        finish=vae.process_output,
    )


def decodes_as_sd(vae: comfy.sd.VAE) -> bool:
    """Returns whether the VAE decodes as SD's does: convolutions with GroupNorm, and no other node's changes."""
    engine = vae.first_stage_model
    return (
        type(vae) is comfy.sd.VAE
        and "decode" not in vars(vae)
        and isinstance(engine, AutoencodingEngine)
        and vae.latent_dim == 2
        and any(isinstance(module, nn.GroupNorm) for module in engine.decoder.modules())
    )


@contextmanager
def _casting(network: nn.Module) -> Iterator[None]:
    """Makes ComfyUI's operations cast their weights to the dtype of what they are given, while the block runs."""
    # Any: the attribute is ComfyUI's, and not in the types of torch's modules.
    plain: list[Any] = [m for m in network.modules() if getattr(m, "comfy_cast_weights", None) is False]
    for module in plain:
        module.comfy_cast_weights = True
    try:
        yield
    finally:
        for module in plain:
            if hasattr(module, "prev_comfy_cast_weights"):  # meanwhile ComfyUI has moved its weights out
                module.prev_comfy_cast_weights = False
            else:
                module.comfy_cast_weights = False


def networks_for(
    model: ModelPatcher,
    encoder: TimeAwareEncoderModel,
    vae: comfy.sd.VAE,
    timestep: int,
    conditioning: Conditioning,
) -> tuple[PhaseNetwork, PhaseNetwork, PhaseNetwork]:
    """Returns the networks of one timestep in their order: encode, predict, decode."""
    return (
        encoder_network(encoder, timestep),
        prediction_network(model, timestep, conditioning),
        decoder_network(vae),
    )
