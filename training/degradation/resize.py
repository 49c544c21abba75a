"""Interpolations for training data: OpenCV's, and antialiased ones as image editors use them (Pillow's)."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

OPENCV_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

PILLOW_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(image: np.ndarray, height: int, width: int, mode: str, antialias: bool = False) -> np.ndarray:
    """Returns `image`, float32 (H, W, 3), at another size; not clamped. Mode: area, bilinear or bicubic.

    Without `antialias`, bilinear and bicubic look at 2x2 and 4x4 pixels however much they shrink, as in
    Real-ESRGAN; with it, their kernels are widened when shrinking. Area is the exact mean in both cases.
    """
    if image.shape[:2] == (height, width):
        return image
    if antialias and mode != "area":
        return _resize_antialiased(image, height, width, PILLOW_MODES[mode])
    return cv2.resize(image, (width, height), interpolation=OPENCV_MODES[mode])


def _resize_antialiased(image: np.ndarray, height: int, width: int, mode: Image.Resampling) -> np.ndarray:
    planes = (Image.fromarray(np.ascontiguousarray(image[:, :, channel])) for channel in range(image.shape[2]))
    return np.dstack([np.asarray(plane.resize((width, height), mode)) for plane in planes])
