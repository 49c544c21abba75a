"""How much memory each network needs for its activations, and how much there is for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management as mm
import torch

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

    from ..models.encoder import TimeAwareEncoderModel

MEGABYTE = 1e6
PREDICT = "predict"  # the phase of the UNet
MORE_MEMORY = (
    "Close other programs that use it, choose bf16 or fp16 as precision in Load TADSR Model, or start ComfyUI with "
    "--cpu, for the whole run on the processor"
)
SHARE_OF_ACTIVATIONS = 0.5  # ComfyUI gives weights 0.4 at least, on some cards nothing
COMFORTABLE_SIDE = 768  # pixels of a square tile: overlaps then cost little, and nothing is moved out for a larger one


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one phase needs in memory: its network, and bytes of activations."""

    phase: str
    patcher: ModelPatcher
    dtype: torch.dtype
    bytes_per_pixel: float  # of activations at their peak, per latent pixel
    downscale: int  # image pixels per latent pixel, along each side
    multiple: int = 1  # latent pixels: where tiles begin, so that the network halves them as it halves the picture

    def bytes_for(self, pixels: int) -> int:
        """Returns the bytes of activations for so many latent pixels at a time."""
        return int(self.bytes_per_pixel * pixels)


def encoder_cost(encoder: TimeAwareEncoderModel) -> Cost:
    """Returns what time-aware encoding needs."""
    side = encoder.downscale
    needed = encoder.model.memory_used((1, 3, side, side), mm.dtype_size(encoder.dtype))
    return Cost(phase="encode", patcher=encoder.patcher, dtype=encoder.dtype, bytes_per_pixel=needed, downscale=side)


def prediction_cost(model: ModelPatcher) -> Cost:
    """Returns what the student UNet needs, by ComfyUI's own formula."""
    latents = model.get_model_object("latent_format")
    halvings = len(model.model.model_config.unet_config["channel_mult"]) - 1
    return Cost(
        phase=PREDICT,
        patcher=model,
        dtype=model.model.get_dtype_inference(),
        bytes_per_pixel=model.model.memory_required((1, latents.latent_channels, 1, 1)),
        downscale=int(latents.spacial_downscale_ratio),
        multiple=2**halvings,
    )


def decoder_cost(vae: comfy.sd.VAE) -> Cost:
    """Returns what the VAE's decoder needs, by the VAE's own formula."""
    needed = vae.memory_used_decode((1, vae.latent_channels, 1, 1), vae.vae_dtype)
    return Cost(
        phase="decode",
        patcher=vae.patcher,
        dtype=vae.vae_dtype,
        bytes_per_pixel=needed,
        downscale=int(vae.spacial_compression_decode()),
    )


def pixels_that_fit(cost: Cost) -> int:
    """Returns how many latent pixels the phase can hold at a time, 0 or less where there is no memory.

    Other models stay loaded as long as a comfortable tile fits beside them, and the network itself as long as one fits
    beside it alone.
    """
    comfortable = (COMFORTABLE_SIDE // cost.downscale) ** 2
    beside_others, beside_weights, most = (
        int(free(cost.patcher) / cost.bytes_per_pixel)
        for free in (free_for_activations, _free_without_others, can_be_free)
    )
    if beside_others >= comfortable:
        return beside_others
    return max(beside_weights, min(comfortable, most))


def free_for_activations(patcher: ModelPatcher) -> int:
    """Returns the bytes that are free on the network's device once its weights are there."""
    device = patcher.load_device
    # Not the patcher's own get_free_memory: under dynamic VRAM it counts all loaded weights as free, this network's
    # and those that `can_be_free` adds.
    free = mm.get_free_memory(device) - mm.extra_reserved_memory()
    weights = 0 if mm.is_device_cpu(device) else patcher.model_size() - patcher.loaded_size()
    return int(free - weights)


def can_be_free(patcher: ModelPatcher) -> int:
    """Returns the bytes that activations can have at most: what is free once other models are moved out.

    Of a network that would leave less than SHARE_OF_ACTIVATIONS, ComfyUI keeps so many weights in main memory.
    """
    free = _free_without_others(patcher)
    if mm.is_device_cpu(patcher.load_device):
        return free
    return max(free, int(SHARE_OF_ACTIVATIONS * (free + patcher.model_size())))


def _free_without_others(patcher: ModelPatcher) -> int:
    """Returns the bytes that are free beside all of the network's weights once other models are moved out."""
    return free_for_activations(patcher) + _held_by_others(patcher)


def _held_by_others(patcher: ModelPatcher) -> int:
    """Returns the bytes of other models' weights that ComfyUI can move out of the network's device."""
    device = patcher.load_device
    if mm.is_device_cpu(device):
        return 0
    others = (
        loaded
        for loaded in mm.current_loaded_models
        if loaded.device == device and loaded.model is not None and loaded.model.model is not patcher.model
    )
    return sum(loaded.model_loaded_memory() for loaded in others)


def not_enough(cost: Cost, side: int) -> MemoryError:
    """Returns the error of a phase whose smallest tile, `side` latent pixels square, does not fit."""
    device = cost.patcher.load_device
    pixels = side * cost.downscale
    needed, free = cost.bytes_for(side**2) / MEGABYTE, mm.get_free_memory(device) / MEGABYTE
    return MemoryError(
        f"out of memory: to {cost.phase} even a tile of {pixels}x{pixels} pixels does not fit. It needs about "
        f"{needed:.0f} MB beside the weights, and {device} has {free:.0f} MB free. {MORE_MEMORY}"
    )
