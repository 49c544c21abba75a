"""8-bit pictures and tensors, into each other."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BYTE_MAX = 255


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Returns uint8 (H, W, 3) as float32 (1, 3, H, W) in [0, 1]."""
    pixels = np.require(pixels, requirements=["C", "W"])  # Pillow's arrays cannot be written to
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / BYTE_MAX


def to_picture(image: Tensor) -> Image.Image:
    """Returns an image, (1, 3, H, W) in [0, 1], rounded to 8 bits."""
    return Image.fromarray((image[0].permute(1, 2, 0) * BYTE_MAX).round().byte().cpu().numpy())
