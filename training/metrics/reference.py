"""Full-reference measures as super-resolution papers report them: PSNR and SSIM of BT.601 luma, and LPIPS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.metrics.lpips import LPIPS

LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
LUMA_OFFSET = 16 / 255
"""ITU-R BT.601 studio-range luma of RGB in [0, 1], as MATLAB's rgb2ycbcr; the result is in 16/255..235/255."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""Wang et al. 2004, for images in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `Reference.score` finds for one image."""

    psnr_y: float
    """In dB; higher is closer."""
    ssim: float
    """At most 1; higher is closer."""
    lpips: dict[str, float]
    """By network, alex or vgg; at least 0; lower is closer."""


class Reference:
    """A true image, which many results are compared with: its LPIPS features are computed once."""

    @torch.no_grad()
    def __init__(self, image: Tensor, networks: Sequence[LPIPS] = (), border: int = 0) -> None:
        """image: (1, 3, H, W) in [0, 1]; border: pixels at each side that PSNR and SSIM leave out, LPIPS does not."""
        self.image, self.border = image, border
        self.features = [(network, network.features(image * 2 - 1)) for network in networks]

    @torch.no_grad()
    def score(self, result: Tensor) -> Scores:
        """Returns the scores of `result`, of the shape and range of the image. Errors as `psnr_y` and `ssim`."""
        return Scores(
            psnr_y=psnr_y(result, self.image, self.border).item(),
            ssim=ssim(result, self.image, self.border).item(),
            lpips={
                network.net: network.distance(network.features(result * 2 - 1), features).item()
                for network, features in self.features
            },
        )


def luma(image: Tensor) -> Tensor:
    """Returns the BT.601 luma (B, 1, H, W), float64, of `image` (B, 3, H, W) in [0, 1]."""
    weights = torch.tensor(LUMA, dtype=torch.float64, device=image.device).view(1, 3, 1, 1)
    return (image.double() * weights).sum(dim=1, keepdim=True) + LUMA_OFFSET


def psnr_y(result: Tensor, reference: Tensor, border: int = 0) -> Tensor:
    """Returns the PSNR of luma in dB, (B,), of images (B, 3, H, W) in [0, 1] without `border` pixels each side.

    Equal images give infinity. Raises ValueError where shapes differ or the border leaves nothing.
    """
    x, y = _luma_inside(result, reference, border)
    return -10 * torch.log10((x - y).square().mean(dim=(1, 2, 3)))


def ssim(result: Tensor, reference: Tensor, border: int = 0) -> Tensor:
    """Returns the structural similarity of luma, (B,), of images (B, 3, H, W) in [0, 1] without `border` pixels.

    Gaussian window of 11 pixels and sigma 1.5, only where it fits wholly. Raises ValueError as `psnr_y`, and for
    sides under 11 pixels.
    """
    x, y = _luma_inside(result, reference, border)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM got {tuple(x.shape[2:])} pixels; accepted: sides from {SSIM_WINDOW}")
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x**2
    variance_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (means * structure).mean(dim=(1, 2, 3))


def _luma_inside(result: Tensor, reference: Tensor, border: int) -> tuple[Tensor, Tensor]:
    if result.shape != reference.shape or result.ndim != 4 or result.shape[1] != 3:
        raise ValueError(f"got {tuple(result.shape)} and {tuple(reference.shape)}; accepted: two equal (B, 3, H, W)")
    height, width = result.shape[2:]
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(f"the border is {border}; accepted for {height}x{width}: 0..{(min(height, width) - 1) // 2}")
    inside = (..., slice(border, height - border), slice(border, width - border))
    return luma(result)[inside], luma(reference)[inside]


def _window_mean(image: Tensor) -> Tensor:
    offset = torch.arange(SSIM_WINDOW, dtype=image.dtype, device=image.device) - SSIM_WINDOW // 2
    line = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    return F.conv2d(F.conv2d(image, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
