"""What the suite upscales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.images import to_tensor

PHOTOGRAPH = Path(__file__).resolve().parent.parent / "assets" / "sample_hq.webp"
LEFT, RIGHT, GRADIENT = "photograph, left", "photograph, right", "smooth gradient"
DRAWING, NIGHT = "flat drawing", "night sky"
PICTURES = (LEFT, RIGHT, GRADIENT, DRAWING, NIGHT)
SKY, GRASS, DRESS, SUN = (86, 143, 255), (90, 170, 80), (255, 184, 208), (255, 240, 120)


def picture(kind: str, side: int) -> Tensor:
    """Returns an IMAGE, (1, side, side, 3): one of two squares of the bundled photograph, or what hides no seam."""
    if kind == DRAWING:
        return to_tensor(np.asarray(_drawing(side))).movedim(1, -1)
    if kind == NIGHT:
        return _night(side)
    if kind == GRADIENT:
        down, across = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
        return torch.stack([0.3 + 0.4 * down, 0.5 + 0.3 * down + 0.1 * across, 0.9 - 0.2 * across], dim=-1)[None]
    whole = Image.open(PHOTOGRAPH).convert("RGB")
    left = 0 if kind == LEFT else whole.width - whole.height
    square = whole.crop((left, 0, left + whole.height, whole.height)).resize((side, side), Image.Resampling.BICUBIC)
    return to_tensor(np.asarray(square)).movedim(1, -1)


def _drawing(side: int) -> Image.Image:
    """Returns a drawing of flat colours, whose middle, where tiles meet, lies in one of them."""
    drawing = Image.new("RGB", (side, side), SKY)
    pen = ImageDraw.Draw(drawing)
    pen.rectangle((0, side * 3 // 4, side, side), fill=GRASS)
    pen.ellipse((side * 0.36, side * 0.36, side * 0.8, side * 0.8), fill=DRESS)
    pen.ellipse((side * 0.1, side * 0.1, side * 0.3, side * 0.3), fill=SUN)
    return drawing


def _night(side: int) -> Tensor:
    """Returns a dark gradient with the noise of a camera and few stars."""
    generator = torch.Generator().manual_seed(0)
    height = torch.linspace(0.02, 0.10, side)[:, None].expand(side, side)
    sky = torch.stack([height * 0.5, height * 0.7, height * 1.5], dim=-1)
    sky[torch.rand(side, side, generator=generator) > 0.999] = 0.9
    return (sky + 0.006 * torch.randn(side, side, 3, generator=generator)).clamp(0.0, 1.0)[None]
