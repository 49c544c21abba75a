"""Blur, resize and noise of the degradation in plain torch, equal to those of `apply` and `resize`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import build_kernel
from .parameters import KernelParameters, NoiseParameters
from .torch_jpeg import to_levels

GRAY = (0.299, 0.587, 0.114)
"""Luma of RGB (ITU-R BT.601), as OpenCV's COLOR_RGB2GRAY."""


def blur(image: Tensor, parameters: KernelParameters) -> Tensor:
    """Returns `image`, float32 (B, 3, H, W), filtered with reflection at the border; not clamped."""
    kernel = torch.from_numpy(build_kernel(parameters)).to(image.device)
    radius = parameters.size // 2
    rows, columns = (_reflected(side, radius, image.device) for side in image.shape[2:])
    padded = image[:, :, rows][..., columns]
    channels = image.shape[1]
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def resize(image: Tensor, height: int, width: int, mode: str, antialias: bool = False) -> Tensor:
    """Returns `image`, float32 (B, 3, H, W), at another size; not clamped. Mode: area, bilinear or bicubic.

    As `resize.resize`; area differs from OpenCV's where one side shrinks and the other grows, by less than a
    hundredth (OpenCV then leaves out pixels that a mean would count with a small weight).
    """
    if image.shape[2:] == (height, width):
        return image
    if mode != "area":
        return F.interpolate(image, (height, width), mode=mode, antialias=antialias)
    rows = area_weights(image.shape[2], height, image.device)
    columns = area_weights(image.shape[3], width, image.device)
    return rows @ image @ columns.T


def area_weights(size: int, target: int, device: torch.device) -> Tensor:
    """Returns how much of each new pixel each of `size` old ones covers: float32 (target, size), rows of sum 1."""
    edges = torch.arange(target + 1, dtype=torch.float64, device=device)[:, None] * size / target
    pixels = torch.arange(size, dtype=torch.float64, device=device)
    covered = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return (covered.clamp(min=0) * target / size).float()


def add_noise(image: Tensor, parameters: NoiseParameters, generator: torch.Generator) -> Tensor:
    """Returns `image`, float32 (B, 3, H, W), with noise, clamped to [0, 1]; `generator` is of the image's device."""
    make = _gaussian_noise if parameters.kind == "gaussian" else _poisson_noise
    source = _gray(image) if parameters.gray else image
    return (image + make(source, parameters.strength, generator)).clamp(0, 1)


def _gray(image: Tensor) -> Tensor:
    weights = torch.tensor(GRAY, device=image.device).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)


def _gaussian_noise(source: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return torch.randn(source.shape, generator=generator, device=source.device) * (sigma / 255)


def _poisson_noise(source: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Shot noise of an image with as many levels as `source` has different 8-bit values, a power of two."""
    levels = to_levels(source)
    different = int(torch.bincount(levels.flatten(), minlength=256).count_nonzero())
    photons = 2 ** (different - 1).bit_length()
    clean = levels.float() / 255
    return (torch.poisson(clean * photons, generator=generator) / photons - clean) * scale


def _reflected(size: int, radius: int, device: torch.device) -> Tensor:
    """Returns indices -radius..size-1+radius reflected into 0..size-1, edges not repeated, however small the size."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(-radius, size + radius, device=device).remainder(period)
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)
