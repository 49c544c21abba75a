"""TADSR for ComfyUI: one-step diffusion super-resolution with a timestep dial."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    """Returns the node pack. ComfyUI calls this once; nothing is imported before."""
    from .nodes import TADSRExtension

    return TADSRExtension()
