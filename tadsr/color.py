"""Colour match of the result to the enlarged input.

Images are (B, C, H, W) in [0, 1]; a matched picture may leave that range.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

VARIANCE_EPS = 1e-5  # added to the variance inside the square root (behaviour of the official code)
WAVELET_LEVELS = 5  # dilations 1, 2, 4, 8, 16 (behaviour of the official code)
WAVELET_REACH = 2**WAVELET_LEVELS - 1  # pixels that a pixel's low band depends on, to each side
WAVELET_KERNEL = (1.0, 2.0, 1.0)  # its outer product over 16
SRGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # IEC 61966-2-1
LAB_EDGE = 6 / 29  # below it Lab is linear (CIE 15)
NEUTRAL_TOLERANCE = 1e-4  # a picture whose channels differ by less is grey: 1/40 of an 8-bit step


class Colors(NamedTuple):
    """Mean and standard deviation of each channel of a picture, (B, C, 1, 1)."""

    mean: Tensor
    std: Tensor  # sqrt(variance + eps), with the unbiased variance


def colors(image: Tensor, alpha: Tensor | None = None) -> Colors:
    """Returns the picture's colours, in which each pixel counts as much as it can be seen.

    alpha: (B, 1, H, W) in [0, 1]; None for a picture without it. Where nothing can be seen, every pixel counts.
    """
    if alpha is None:
        pixels = image.shape[-2] * image.shape[-1]
        variance = image.var(dim=(-2, -1), keepdim=True, correction=1 if pixels > 1 else 0)
        return Colors(image.mean(dim=(-2, -1), keepdim=True), (variance + VARIANCE_EPS).sqrt())
    weights = alpha.where(alpha.amax(dim=(-2, -1), keepdim=True) > 0, 1.0)
    weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
    mean = (weights * image).sum(dim=(-2, -1), keepdim=True)
    variance = (weights * (image - mean) ** 2).sum(dim=(-2, -1), keepdim=True)
    # Unbiased, for weights that say how much a pixel counts: without any, pixels / (pixels - 1).
    free = 1 - (weights**2).sum(dim=(-2, -1), keepdim=True)
    return Colors(mean, (variance / free.where(free > 0, 1.0) + VARIANCE_EPS).sqrt())


def estimated_colors(
    thumbnail: Tensor, reference_thumbnail: Tensor, reference: Colors, alpha: Tensor | None = None
) -> Colors:
    """Returns the colours of a result as a whole, told from a smaller copy of it.

    reference_thumbnail: the same copy of the reference; reference: the colours of the whole reference; alpha: the
    same copy of alpha. Only the difference between the copies counts, so that it matters little what became of the
    colours in making a copy.
    """
    own, wanted = colors(thumbnail, alpha), colors(reference_thumbnail, alpha)
    return Colors(reference.mean + own.mean - wanted.mean, reference.std * own.std / wanted.std)


def match_adain(result: Tensor, reference: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Returns `result` with the mean and standard deviation of `reference`, per image and channel.

    alpha: of both, (B, 1, H, W), as in `colors`.
    """
    return match_colors(result.clone(), colors(result, alpha), colors(reference, alpha))


def match_colors(part: Tensor, own: Colors, wanted: Colors) -> Tensor:
    """Returns a part of a picture, changed in place, with the picture's `own` colours turned into those `wanted`."""
    return part.sub_(own.mean).div_(own.std).mul_(wanted.std).add_(wanted.mean)


def match_wavelet(result: Tensor, reference: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Returns the high frequencies of `result` on the low frequencies of `reference`.

    alpha: of both, (B, 1, H, W): a pixel counts in the low frequencies as much as it can be seen.
    """
    if alpha is None:
        return result - wavelet_low(result) + wavelet_low(reference)
    change, seen = wavelet_low((reference - result) * alpha), wavelet_low(alpha)
    return result + (change / seen.where(seen > 0, 1.0))


def wavelet_low(image: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """Returns the low band: `levels` blurs with a 3x3 kernel dilated 1, 2, 4, ..., replicating the border."""
    channels = image.shape[1]
    row = torch.tensor(WAVELET_KERNEL, dtype=image.dtype, device=image.device)
    kernel = (torch.outer(row, row) / row.sum() ** 2).expand(channels, 1, 3, 3)
    for level in range(levels):
        dilation = 2**level
        padded = F.pad(image, (dilation,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, groups=channels, dilation=dilation)
    return image


def match_lab(result: Tensor, reference: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Returns `result` with the mean and standard deviation of `reference` in CIE Lab, clamped to [0, 1].

    Reinhard et al., "Color Transfer between Images" (2001), in CIE Lab: lightness and colour do not mix, as they do
    in the three channels of RGB.
    """
    return lab_to_rgb(match_adain(rgb_to_lab(result), rgb_to_lab(reference), alpha))


def rgb_to_lab(image: Tensor) -> Tensor:
    """Returns sRGB in [0, 1], clamped to it, as CIE Lab over 100: L in [0, 1], a and b about -1..1.

    image: (B, 3, H, W). White is D65 (IEC 61966-2-1, CIE 15).
    """
    image = image.clamp(0.0, 1.0)
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", _xyz_matrix(image), linear)
    x, y, z = torch.where(xyz > LAB_EDGE**3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * LAB_EDGE**2) + 4 / 29).unbind(
        1
    )
    return torch.stack([1.16 * y - 0.16, 5.0 * (x - y), 2.0 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Returns CIE Lab over 100 as sRGB, clamped to [0, 1]; the inverse of `rgb_to_lab`."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 0.16) / 1.16
    root = torch.stack([y + a / 5.0, y, y - b / 2.0], dim=1)
    xyz = torch.where(root > LAB_EDGE, root**3, (root - 4 / 29) * (3 * LAB_EDGE**2))
    linear = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(_xyz_matrix(lab)), xyz).clamp(0.0, 1.0)
    curved = 1.055 * linear.clamp_min(1e-12) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, linear * 12.92).clamp(0.0, 1.0)


def _xyz_matrix(like: Tensor) -> Tensor:
    """Returns the matrix from linear sRGB to XYZ in units of its white, so that white is (1, 1, 1)."""
    matrix = torch.tensor(SRGB_TO_XYZ, dtype=torch.float64)
    return (matrix / matrix.sum(1, keepdim=True)).to(like)


def keep_result(result: Tensor, reference: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Returns `result` unchanged."""
    return result


class Match(Protocol):
    """Gives a result the colours of its reference."""

    def __call__(self, result: Tensor, reference: Tensor, alpha: Tensor | None = None) -> Tensor: ...


DEFAULT_COLOR_MATCH = "adain"
COLOR_MATCHES: dict[str, Match] = {
    "adain": match_adain,
    "wavelet": match_wavelet,
    "lab": match_lab,
    "none": keep_result,
}


def is_neutral(image: Tensor, alpha: Tensor | None = None) -> bool:
    """Returns whether every pixel of an RGB image that can be seen is grey. alpha: (B, 1, H, W)."""
    low, high = image.aminmax(dim=1)
    spread = high.sub_(low)
    return bool((spread if alpha is None else spread * (alpha[:, 0] > 0)).max() < NEUTRAL_TOLERANCE)


def to_neutral(image: Tensor) -> Tensor:
    """Returns the image with each pixel's channels replaced by their mean."""
    return image.mean(dim=1, keepdim=True).expand_as(image)
