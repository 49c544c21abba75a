"""Degradation of one photograph by drawn parameters, on the CPU."""

from __future__ import annotations

import cv2
import numpy as np

from .config import FULL, DegradationConfig
from .kernels import build_kernel
from .parameters import (
    DegradationParameters,
    KernelParameters,
    NoiseParameters,
    draw_parameters,
)
from .pipeline import Operators
from .resize import resize


def degrade(hq: np.ndarray, rng: np.random.Generator, config: DegradationConfig = FULL) -> np.ndarray:
    """Returns a random degradation of `hq`: uint8 (H/4, W/4, 3) RGB; the same `rng` state, the same image.

    hq: float32 (H, W, 3) RGB in [0, 1], H and W multiples of 4. Raises ValueError otherwise.
    """
    return apply(hq, draw_parameters(rng, config), rng)


def apply(hq: np.ndarray, parameters: DegradationParameters, rng: np.random.Generator) -> np.ndarray:
    """Returns the degradation of `hq` by `parameters`; `rng` gives the noise. Shapes as in `degrade`."""
    _check_photograph(hq, parameters.downscale)
    return to_bytes(OPERATORS.run(np.ascontiguousarray(hq), hq.shape[:2], parameters, rng))


def blur(image: np.ndarray, parameters: KernelParameters) -> np.ndarray:
    """Returns `image`, float32 (H, W, 3), filtered with reflection at the border; not clamped."""
    return cv2.filter2D(image, -1, build_kernel(parameters), borderType=cv2.BORDER_REFLECT_101)


def add_noise(image: np.ndarray, parameters: NoiseParameters, rng: np.random.Generator) -> np.ndarray:
    """Returns `image`, float32 (H, W, 3), with noise, clamped to [0, 1]."""
    make = _gaussian_noise if parameters.kind == "gaussian" else _poisson_noise
    source = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None] if parameters.gray else image
    return np.clip(image + make(source, parameters.strength, rng), 0, 1)


def compress_jpeg(image: np.ndarray, quality: int | None) -> np.ndarray:
    """Returns `image`, float32 (H, W, 3) RGB, after JPEG (4:2:0) of `quality` 1..100; None: unchanged."""
    if quality is None:
        return image
    blue_green_red = np.ascontiguousarray(to_bytes(image)[:, :, ::-1])
    _, data = cv2.imencode(".jpg", blue_green_red, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return decoded[:, :, ::-1].astype(np.float32) / 255


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Returns `image`, float in [0, 1], clamped and rounded to uint8."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


OPERATORS = Operators(blur, resize, add_noise, compress_jpeg)


def _gaussian_noise(source: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(source.shape, dtype=np.float32) * np.float32(sigma / 255)


def _poisson_noise(source: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Shot noise of an image with as many levels as `source` has different 8-bit values, a power of two."""
    levels = to_bytes(source)
    different = np.count_nonzero(np.bincount(levels.ravel(), minlength=256))
    photons = 2 ** int(np.ceil(np.log2(different)))
    clean = levels.astype(np.float32) / 255
    return (rng.poisson(clean * photons).astype(np.float32) / photons - clean) * np.float32(scale)


def _check_photograph(hq: np.ndarray, downscale: int) -> None:
    if hq.ndim != 3 or hq.shape[2] != 3:
        raise ValueError(f"the photograph's shape is {hq.shape}; accepted: (height, width, 3), RGB")
    if hq.dtype != np.float32:
        raise ValueError(f"the photograph's type is {hq.dtype}; accepted: float32 in [0, 1]")
    height, width = hq.shape[:2]
    if height == 0 or width == 0 or height % downscale or width % downscale:
        raise ValueError(f"the photograph is {height}x{width}; accepted: multiples of {downscale}, not 0")
    if not (hq.min() >= 0 and hq.max() <= 1):
        raise ValueError(f"the photograph's values are {hq.min()}..{hq.max()}; accepted: 0..1")
