"""The three networks: what each costs, how it may be cut into tiles, and how it is called.

A Stage is all that planning and running a network need to know of it; nothing else asks which of the three it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from torch import Tensor, nn

from ..compat import device_context
from ..models.encoder import TimeAwareEncoderModel
from ..models.student import Conditioning, one_step

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Call = Callable[[Tensor, int], Tensor]  # (n, C, h, w) and a timestep -> (n, C', f h, f w)

PICTURE_DIMENSIONS = 2  # of a latent that is a picture: height and width
# Entries of a CONDITIONING that belong to places in the whole picture, which a tile does not know.
PLACED = {"area", "mask", "control", "gligen", "concat_latent_image"}

# Automatic overlaps in latent pixels, measured: docs/performance.md. A VAE sees further the more often it halves, so
# its are per pixel of the result that a latent pixel stands for.
ENCODER_OVERLAP, DECODER_OVERLAP = 4, 3
UNET_OVERLAP = 16
# Side of the largest square, in pixels, that is done at once though memory would hold more: attention grows with the
# square of the area, so that a larger one takes longer than the same area in tiles. One side for all: of a picture that
# one stage would cut, the others' copies are needed too.
VAE_LARGEST_SIDE, UNET_LARGEST_SIDE = 1536, 1536
# Time for one latent pixel before anything was measured, relative to each other.
ENCODER_TIME, UNET_TIME, DECODER_TIME = 0.3, 0.2, 0.5


def _unchanged(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One network, and everything that the rest must know of it."""

    name: str  # what it does, as a verb: it stands in messages
    patcher: ModelPatcher
    dtype: torch.dtype
    bytes_per_pixel: float  # of activations at their peak, per latent pixel
    typical_time: float  # for one latent pixel, relative to the other stages
    downscale: int  # pixels of the result per latent pixel, along each side

    overlap: int  # of automatic tiles, latent pixels
    largest_side: int  # pixels of the result; a larger square is not done at once
    multiple: int = 1  # latent pixels: where tiles begin, so that the network halves them as it halves the picture
    is_tileable: bool = True
    module: nn.Module | None  # holds its GroupNorms, each called once a run; None where that is not known

    call: Call
    in_float32: Call | None  # the same in full precision; None where it already is
    source_factor: int  # pixels of the source per latent pixel, along each side
    result_factor: int  # the same of the result
    postprocess: Callable[[Tensor], Tensor] = _unchanged  # what the blended result still needs

    def bytes_for(self, pixels: int) -> int:
        """Returns the bytes of activations for so many latent pixels at a time."""
        return int(self.bytes_per_pixel * pixels)


def upscale_stages(
    model: ModelPatcher, encoder: TimeAwareEncoderModel, vae: comfy.sd.VAE, conditioning: Conditioning
) -> tuple[Stage, Stage, Stage]:
    """Returns encoder, student and decoder in their order. Raises ValueError for a VAE of other latents."""
    check_vae(vae, model.get_model_object("latent_format").latent_channels, encoder.downscale)
    return encoder_stage(encoder), prediction_stage(model, conditioning), decoder_stage(vae)


def check_vae(vae: comfy.sd.VAE, channels: int, downscale: int) -> None:
    """Raises ValueError unless the VAE decodes latents of so many channels, each for so many pixels a side."""
    if vae.latent_dim == PICTURE_DIMENSIONS and vae.latent_channels == channels:
        seen = int(vae.spacial_compression_decode())
        if seen == downscale:
            return
        what = f"one for {seen} pixels of the picture a side"
    else:
        what = f"of {vae.latent_channels} channels in {vae.latent_dim} dimensions"
    raise ValueError(
        f"vae decodes latents {what}; accepted are those of {channels} channels in {PICTURE_DIMENSIONS} dimensions, "
        f"one for {downscale} pixels a side, as the VAE of Load TADSR Model does"
    )


def encoder_stage(encoder: TimeAwareEncoderModel) -> Stage:
    """Returns the encoder: RGB in [0, 1] -> moments of the latent."""
    downscale = encoder.downscale
    return Stage(
        name="encode",
        patcher=encoder.patcher,
        dtype=encoder.dtype,
        bytes_per_pixel=encoder.model.memory_used((1, 3, downscale, downscale), mm.dtype_size(encoder.dtype)),
        typical_time=ENCODER_TIME,
        downscale=downscale,
        overlap=ENCODER_OVERLAP * downscale,
        largest_side=VAE_LARGEST_SIDE,
        module=encoder.model,
        call=encoder.moments,
        in_float32=None if encoder.dtype == torch.float32 else partial(encoder.moments, float32=True),
        source_factor=downscale,
        result_factor=1,
    )


def prediction_stage(model: ModelPatcher, conditioning: Conditioning, *, is_masked: bool = False) -> Stage:
    """Returns the student: latent -> clean latent. It runs in tiles only for a conditioning of one plain prompt.

    is_masked: the latent's last channel is its noise mask, so that tiles are cut from both.
    """

    def call(latent: Tensor, timestep: int) -> Tensor:
        if not is_masked:
            return one_step(model, latent, timestep, conditioning)
        return one_step(model, latent[:, :-1], timestep, conditioning, latent[:, -1:])

    def in_float32(latent: Tensor, timestep: int) -> Tensor:
        base = model.model
        usual, base.manual_cast_dtype = base.manual_cast_dtype, torch.float32
        try:
            with _casting(base.diffusion_model):
                return call(latent, timestep)
        finally:
            base.manual_cast_dtype = usual

    latents = model.get_model_object("latent_format")
    halvings = len(model.model.model_config.unet_config["channel_mult"]) - 1
    is_tileable = _is_one_plain_prompt(conditioning)
    return Stage(
        name="predict",
        patcher=model,
        dtype=model.model.get_dtype_inference(),
        bytes_per_pixel=model.model.memory_required((1, latents.latent_channels, 1, 1)),  # ComfyUI's own formula
        typical_time=UNET_TIME,
        downscale=int(latents.spacial_downscale_ratio),
        overlap=UNET_OVERLAP,
        largest_side=UNET_LARGEST_SIDE,
        multiple=2**halvings,
        is_tileable=is_tileable,
        module=model.model.diffusion_model if is_tileable else None,
        call=call,
        in_float32=None if model.model.get_dtype_inference() == torch.float32 else in_float32,
        source_factor=1,
        result_factor=1,
    )


def _is_one_plain_prompt(conditioning: Conditioning) -> bool:
    """Returns whether a tile can be predicted with the conditioning of the picture: it is bound to no place."""
    return len(conditioning) == 1 and not PLACED & conditioning[0][1].keys()


def decoder_stage(vae: comfy.sd.VAE) -> Stage:
    """Returns the decoder: latent -> picture, RGB in [0, 1] once postprocessed. The timestep makes no difference."""
    downscale = int(vae.spacial_compression_decode())
    facts = partial(
        Stage,
        name="decode",
        patcher=vae.patcher,
        dtype=vae.vae_dtype,
        bytes_per_pixel=vae.memory_used_decode((1, vae.latent_channels, 1, 1), vae.vae_dtype),  # the VAE's own formula
        typical_time=DECODER_TIME,
        downscale=downscale,
        overlap=DECODER_OVERLAP * downscale,
        largest_side=VAE_LARGEST_SIDE,
        source_factor=1,
        result_factor=downscale,
    )
    if not is_sd_decoder(vae):
        return facts(call=lambda latent, _: vae.decode(latent).movedim(-1, 1), in_float32=None, module=None)
    engine = vae.first_stage_model

    def call(latent: Tensor, _: int, dtype: torch.dtype = vae.vae_dtype) -> Tensor:
        memory = vae.memory_used_decode(latent.shape, dtype)
        mm.load_models_gpu([vae.patcher], memory_required=memory, force_full_load=vae.disable_offload)
        with device_context(vae.device):
            return engine.decode(latent.to(device=vae.device, dtype=dtype)).float()

    def in_float32(latent: Tensor, timestep: int) -> Tensor:
        with _casting(engine):
            return call(latent, timestep, torch.float32)

    return facts(
        call=call,
        in_float32=None if vae.vae_dtype == torch.float32 else in_float32,
        module=engine.decoder,
        postprocess=vae.process_output,
    )


def is_sd_decoder(vae: comfy.sd.VAE) -> bool:
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
