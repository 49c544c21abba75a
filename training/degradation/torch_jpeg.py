"""JPEG in plain torch, as libjpeg (behind OpenCV and Pillow) does it: encoded and decoded without the entropy coding.

The steps are those of ITU-T T.81 and JFIF: 8-bit YCbCr, chroma averaged over 2x2 pixels, cosine transform of 8x8
blocks, quantisation by the tables of T.81's annex K, and back, with libjpeg's triangle filter ("fancy upsampling") on
the chroma. Integer steps use libjpeg's fixed-point numbers, so nearly all pixels come out equal to its.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi

import torch
from torch import Tensor

BLOCK = 8
CHROMA_STEP = 2
"""4:2:0: one chroma value for 2x2 pixels."""
FIXED_POINT_BITS = 16
"""libjpeg's colour conversion computes in integers with 16 fractional bits."""
QUARTERS = 4
"""libjpeg's transform keeps two fractional bits between its two passes (PASS1_BITS of its "islow" method)."""
HALF_UP = 0.5 + 2**-10
"""That transform rounds halves up, and plain blocks give many of them; above 1/2 by more than float32's error."""
LUMA_TABLE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
"""ITU-T T.81, table K.1, row by row."""
CHROMA_TABLE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 32),
)
"""ITU-T T.81, table K.2, row by row."""


def compress_jpeg(image: Tensor, quality: int | None) -> Tensor:
    """Returns `image`, float32 (B, 3, H, W) RGB, after JPEG (4:2:0) of `quality` 1..100; None: unchanged.

    The input is clamped to [0, 1] and rounded to 8 bits; so is the result. Not to be run under autocast.
    """
    if quality is None:
        return image
    height, width = image.shape[2:]
    luma, blue, red = _to_ycbcr(to_levels(image))
    luma = _code(_pad_to_blocks(luma), quality_table(LUMA_TABLE, quality))[..., :height, :width]
    chroma_height, chroma_width = -(-height // CHROMA_STEP), -(-width // CHROMA_STEP)
    table = quality_table(CHROMA_TABLE, quality)
    small = _code(_pad_to_blocks(_halve(torch.stack((blue, red)))), table)[..., :chroma_height, :chroma_width]
    blue, red = _enlarge_chroma(small)[..., :height, :width]
    return _to_rgb(luma, blue, red).to(image.dtype) / 255


def to_levels(image: Tensor) -> Tensor:
    """Returns `image`, float in [0, 1], clamped and rounded to 0..255: int32."""
    return (image.clamp(0, 1) * 255).round().int()


def quality_table(table: tuple[int, ...], quality: int) -> tuple[int, ...]:
    """Returns the quantisation table for `quality` 1..100, 50 giving `table` itself: integers 1..255, as libjpeg."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(max((step * percent + 50) // 100, 1), 255) for step in table)


def _fixed(value: float) -> int:
    return round(value * 2**FIXED_POINT_BITS)


def _shift(value: Tensor, rounding: int = 2 ** (FIXED_POINT_BITS - 1)) -> Tensor:
    return (value + rounding) >> FIXED_POINT_BITS


def _to_ycbcr(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Y, Cb and Cr, int32 (B, H, W) in 0..255, of int32 RGB (B, 3, H, W) (JFIF 1.02, section 7)."""
    red, green, blue = levels.unbind(1)
    luma = _shift(_fixed(0.299) * red + _fixed(0.587) * green + _fixed(0.114) * blue)
    below_half = 2 ** (FIXED_POINT_BITS - 1) - 1  # libjpeg rounds chroma's halves down, to stay within 255
    first = -_fixed(0.168735892) * red - _fixed(0.331264108) * green + _fixed(0.5) * blue
    second = _fixed(0.5) * red - _fixed(0.418687589) * green - _fixed(0.081312411) * blue
    return luma, _shift(first, below_half) + 128, _shift(second, below_half) + 128


def _to_rgb(luma: Tensor, blue_chroma: Tensor, red_chroma: Tensor) -> Tensor:
    cb, cr = blue_chroma - 128, red_chroma - 128
    red = luma + _shift(_fixed(1.402) * cr)
    green = luma + _shift(-_fixed(0.344136286) * cb - _fixed(0.714136286) * cr)
    blue = luma + _shift(_fixed(1.772) * cb)
    return torch.stack((red, green, blue), dim=1).clamp(0, 255)


def _halve(planes: Tensor) -> Tensor:
    """Returns means of 2x2 pixels, (..., ceil(H / 2), ceil of half the padded width): int32.

    The width is padded before the mean and the height (but for an odd row) after it, as libjpeg does. Its rounding
    alternates between columns, so that the mean stays.
    """
    padded = _replicate(planes, planes.shape[-2] % CHROMA_STEP, -planes.shape[-1] % (BLOCK * CHROMA_STEP))
    total = padded.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum(dim=(-3, -1), dtype=torch.int32)
    rounding = 1 + torch.arange(total.shape[-1], dtype=torch.int32, device=planes.device) % 2
    return (total + rounding) >> 2


def _enlarge_chroma(planes: Tensor) -> Tensor:
    """Returns int32 planes of twice the height and width: 3/4 of the nearer pixel and 1/4 of the next, both ways."""
    height, width = planes.shape[-2:]
    rows = _neighbours(height, planes.device)
    tall = (3 * planes.unsqueeze(-2) + planes[..., rows, :]).flatten(-3, -2)
    columns = _neighbours(width, planes.device)
    rounding = torch.tensor((8, 7), dtype=torch.int32, device=planes.device)
    return ((3 * tall.unsqueeze(-1) + tall[..., columns] + rounding) >> 4).flatten(-2)


def _neighbours(size: int, device: torch.device) -> Tensor:
    """Returns the indices of the pixels before and after each of `size`, the ends their own neighbours: (size, 2)."""
    index = torch.arange(size, device=device)
    return torch.stack((index - 1, index + 1), dim=1).clamp(0, size - 1)


def _pad_to_blocks(planes: Tensor) -> Tensor:
    return _replicate(planes, -planes.shape[-2] % BLOCK, -planes.shape[-1] % BLOCK)


def _replicate(planes: Tensor, bottom: int, right: int) -> Tensor:
    rows = torch.arange(planes.shape[-2] + bottom, device=planes.device).clamp(max=planes.shape[-2] - 1)
    columns = torch.arange(planes.shape[-1] + right, device=planes.device).clamp(max=planes.shape[-1] - 1)
    return planes[..., rows, :][..., columns]


@cache
def _cosines() -> tuple[tuple[float, ...], ...]:
    """Returns the 8-point cosine transform, a row for each frequency, sqrt(8) times the orthonormal one, as libjpeg."""
    scales = [1.0 if frequency == 0 else 2**0.5 for frequency in range(BLOCK)]
    return tuple(
        tuple(scale * cos((2 * position + 1) * frequency * pi / (2 * BLOCK)) for position in range(BLOCK))
        for frequency, scale in enumerate(scales)
    )


def _code(planes: Tensor, table: tuple[int, ...]) -> Tensor:
    """Returns int32 planes (..., H, W) of 0..255, sides multiples of 8, after transform, quantisation and back."""
    transform = torch.tensor(_cosines(), device=planes.device)
    steps = torch.tensor(table, dtype=torch.float32, device=planes.device).view(BLOCK, BLOCK)
    blocks = (planes - 128).float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2)
    eighths = _half_up(transform @ _half_up(blocks @ transform.T * QUARTERS) / QUARTERS)
    # Ties between two levels go away from zero.
    levels = eighths.sign() * ((eighths.abs() + 4 * steps) / (8 * steps)).floor()
    decoded = _half_up(_half_up(transform.T @ (levels * steps) * QUARTERS) @ transform / (8 * QUARTERS))
    return (decoded.transpose(-3, -2).flatten(-2).flatten(-3, -2) + 128).clamp(0, 255).int()


def _half_up(value: Tensor) -> Tensor:
    return (value + HALF_UP).floor()
