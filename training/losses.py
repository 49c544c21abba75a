"""Reconstruction losses of TADSR, each a small function of images in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLUR_STEP = 200  # paper, equation 14: the kernel grows every 200 timesteps


def blur_size(timestep: int) -> int:
    """Returns the kernel size 5 + 4 floor(t / 200) (paper, equation 14)."""
    return 5 + 4 * (timestep // BLUR_STEP)


def blur_sigma(timestep: int) -> float:
    """Returns the kernel's standard deviation 1 + t / 200, in pixels (paper, equation 14)."""
    return 1 + timestep / BLUR_STEP


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """Returns a normalised one-dimensional Gaussian, (size,) float32, size odd."""
    x = torch.arange(size, dtype=torch.float32) - size // 2
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def blur(image: Tensor, timestep: Tensor) -> Tensor:
    """Returns each image blurred by its timestep's kernel, with reflected borders.

    image: (B, C, H, W), H and W greater than half the largest kernel (10); timestep: (B,), 0..999.
    """
    batch, channels, height, width = image.shape
    steps = [int(t) for t in timestep]
    largest = max(blur_size(t) for t in steps)
    half = largest // 2
    kernels = torch.stack(
        [F.pad(gaussian_kernel(blur_size(t), blur_sigma(t)), [half - blur_size(t) // 2] * 2) for t in steps]
    ).to(image)
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None, None, :]
    flat = F.pad(image, [half] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * half, -1)
    flat = F.conv2d(flat, kernels, groups=batch * channels)
    flat = F.conv2d(flat, kernels.transpose(2, 3), groups=batch * channels)
    return flat.reshape(batch, channels, height, width)


def blurred_mse(result: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    """Returns the mean squared difference of the blurred images, per sample (B,) (paper, equation 7).

    Blurring is linear, so the difference is blurred once. result, target: (B, 3, H, W) in [-1, 1].
    """
    return blur(result - target, timestep).square().mean(dim=(1, 2, 3))
