"""Blur kernels of Real-ESRGAN (arXiv 2107.10833, section 3.1 and equation 6)."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np
from scipy.special import j1

from .parameters import KernelParameters


def build_kernel(parameters: KernelParameters) -> np.ndarray:
    """Returns the kernel: float32 (size, size), sum 1."""
    if parameters.family == "sinc":
        kernel = sinc_kernel(parameters.size, parameters.cutoff)
    else:
        kernel = _profile(parameters.family, squared_distance(parameters), parameters.beta)
    return (kernel / kernel.sum()).astype(np.float32)


def squared_distance(parameters: KernelParameters) -> np.ndarray:
    """Returns the squared Mahalanobis distance of each pixel from the centre: float64 (size, size)."""
    x, y = _grid(parameters.size)
    cosine, sine = cos(parameters.rotation), sin(parameters.rotation)
    along, across = cosine * x + sine * y, cosine * y - sine * x
    return (along / parameters.sigma_x) ** 2 + (across / parameters.sigma_y) ** 2


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """Returns the circular low-pass filter of `cutoff` radians a pixel, not normalised: float64 (size, size).

    Equation 6 of Real-ESRGAN: cutoff / (2 pi r) * J1(cutoff r), whose limit at r = 0 is cutoff^2 / (4 pi).
    """
    x, y = _grid(size)
    radius = np.hypot(x, y)
    radius[size // 2, size // 2] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * pi)
    return kernel


def _profile(family: str, distance: np.ndarray, beta: float) -> np.ndarray:
    if family.startswith("plateau"):
        return 1 / (1 + distance**beta)
    if family.startswith("generalized"):
        distance = distance**beta
    return np.exp(-0.5 * distance)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y
