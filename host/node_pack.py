"""The pack's nodes as functions, in a ComfyUI in this process, and the prompts that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadsr.geometry import resize_bicubic

from .comfy_in_process import InProcessComfy

NO_BASE = "none (the weights file holds its base)"  # the loader's first base; also in shipped workflows


@dataclass(frozen=True)
class Pack:
    """The nodes, and what Load TADSR Model gave."""

    comfy: InProcessComfy
    model: Any
    encoder: Any
    vae: Any
    clip: Any
    prompt: Any

    def upscale(self, image: Tensor, timestep: int = 500, **inputs: Any) -> Tensor:
        """Returns the result of a run of its own: the node keeps what it decoded of a tensor, and this is a new one."""
        return self.upscale_kept(image.clone(), timestep, **inputs)

    def upscale_kept(self, image: Tensor, timestep: int = 500, **inputs: Any) -> Tensor:
        """Returns the result; no network runs where the node has kept what it needs."""
        node = self.comfy.node("TADSRUpscale")
        return node.execute(self.model, self.encoder, self.vae, image, timestep, **inputs).result[0]

    def encode(self, image: Tensor, timestep: int = 500, **inputs: Any) -> tuple[dict[str, Any], Tensor]:
        return self.comfy.node("TADSREncode").execute(self.encoder, image, timestep, **inputs).result

    def one_step(self, latent: dict[str, Any], **inputs: Any) -> dict[str, Any]:
        return self.comfy.node("TADSROneStep").execute(self.model, latent, **inputs).result[0]

    def finish(self, image: Tensor, reference: Tensor, color_match: str = "adain") -> Tensor:
        return self.comfy.node("TADSRFinish").execute(image, reference, color_match).result[0]

    def decode(self, latent: dict[str, Any]) -> Tensor:
        return self.comfy.node("VAEDecode")().decode(self.vae, latent)[0]


@torch.inference_mode()
def load_pack(comfy: InProcessComfy, weights: str, base: str = NO_BASE, precision: str = "auto") -> Pack:
    """Returns the nodes with what Load TADSR Model gives for a weights file."""
    return Pack(comfy, *comfy.node("TADSRModelLoader").execute(weights, base, precision).result)


def models_folder(comfy: InProcessComfy) -> Path:
    """Returns ComfyUI's models folder, with folders for weights and checkpoints in it."""
    models = comfy.base / "models"
    for name in ("tadsr", "checkpoints"):
        (models / name).mkdir(parents=True, exist_ok=True)
    return models


def picture(height: int, width: int, channels: int = 3, batch: int = 1, seed: int = 0) -> Tensor:
    """Returns a smooth random IMAGE."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, max(2, height // 4), max(2, width // 4), generator=generator)
    return resize_bicubic(coarse, (height, width)).clamp(0, 1).movedim(1, -1)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Returns a node of an API-format prompt."""
    return {"class_type": class_type, "inputs": inputs}
