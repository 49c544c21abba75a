"""How much memory there is for a network's activations, and how many pixels fit into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management as mm

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .stages import Stage

MEGABYTE = 1e6
MORE_MEMORY = (
    "Close other programs that use it, choose bf16 or fp16 as precision in Load TADSR Model, or start ComfyUI with "
    "--cpu, for the whole run on the processor"
)
SHARE_OF_ACTIVATIONS = 0.5  # ComfyUI gives weights 0.4 at least, on some cards nothing
COMFORTABLE_SIDE = 768  # pixels of a square tile: overlaps then cost little, and nothing is moved out for a larger one


def pixels_that_fit(stage: Stage, pictures: int = 0) -> int:
    """Returns how many latent pixels the stage can hold at a time, 0 or less where there is no memory.

    pictures: bytes that the run's pictures will take where nodes keep them, which may be the network's device.

    Other models stay loaded as long as a comfortable tile fits beside them, and the network itself as long as one fits
    beside it alone.
    """
    comfortable = (COMFORTABLE_SIDE // stage.downscale) ** 2
    taken = pictures if stage.patcher.load_device == mm.intermediate_device() else 0
    beside_others, beside_weights, most = (
        int((free(stage.patcher) - taken) / stage.bytes_per_pixel)
        for free in (free_for_activations, _free_without_others, free_if_all_unloaded)
    )
    if beside_others >= comfortable:
        return beside_others
    return max(beside_weights, min(comfortable, most))


def free_for_activations(patcher: ModelPatcher) -> int:
    """Returns the bytes that are free on the network's device once its weights are there."""
    device = patcher.load_device
    # Not the patcher's own get_free_memory: under dynamic VRAM it counts all loaded weights as free, this network's
    # and those that `free_if_all_unloaded` adds.
    free = mm.get_free_memory(device) - mm.extra_reserved_memory()
    weights = 0 if mm.is_device_cpu(device) else patcher.model_size() - patcher.loaded_size()
    return int(free - weights)


def free_if_all_unloaded(patcher: ModelPatcher) -> int:
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


def out_of_memory_error(stage: Stage, side: int) -> MemoryError:
    """Returns the error of a stage whose smallest tile, `side` latent pixels square, does not fit."""
    device = stage.patcher.load_device
    pixels = side * stage.downscale
    needed, free = stage.bytes_for(side**2) / MEGABYTE, mm.get_free_memory(device) / MEGABYTE
    return MemoryError(
        f"out of memory: to {stage.name} even a tile of {pixels}x{pixels} pixels does not fit. It needs about "
        f"{needed:.0f} MB beside the weights, and {device} has {free:.0f} MB free. {MORE_MEMORY}"
    )
