"""What the suite upscales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.images import to_tensor

PHOTOGRAPH = Path(__file__).resolve().parent.parent / "assets" / "sample_hq.webp"
LEFT, RIGHT, GRADIENT = "photograph, left", "photograph, right", "smooth gradient"
PICTURES = (LEFT, RIGHT, GRADIENT)


def picture(kind: str, side: int) -> Tensor:
    """Returns an IMAGE, (1, side, side, 3): one of two squares of the bundled photograph, or a smooth gradient."""
    if kind == GRADIENT:
        down, across = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
        return torch.stack([0.3 + 0.4 * down, 0.5 + 0.3 * down + 0.1 * across, 0.9 - 0.2 * across], dim=-1)[None]
    whole = Image.open(PHOTOGRAPH).convert("RGB")
    left = 0 if kind == LEFT else whole.width - whole.height
    square = whole.crop((left, 0, left + whole.height, whole.height)).resize((side, side), Image.Resampling.BICUBIC)
    return to_tensor(np.asarray(square)).movedim(1, -1)
