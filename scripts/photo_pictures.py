"""Cleans photographs for training: scale, fingerprints against duplicates, and disjoint crops that show something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LONGEST_SIDE = 2048
SMALLEST_SIDE = 256
LARGE_SHORT_SIDE = 2 * SMALLEST_SIDE
"""Pictures whose short side has at least this many pixels can be halved and still give a crop."""
COMPRESSED_BITS_PER_PIXEL = 3.0
NOISY_BITS_PER_PIXEL = 12.0
"""JPEGs below the first or above the second are halved when large; measured here: camera originals have 3 to 10,
web copies 1 to 2, and unprocessed high-ISO pictures, which are noisy, 16 to 21."""
UNUSABLE_BITS_PER_PIXEL = 1.0
UNUSABLE_SHORT_SIDE = 1000
"""JPEGs below both are left out: even halved, their block artefacts would be learnt as detail."""
SOFT_DETAIL_RATIO = 0.6
"""Below this the finest octave of a picture holds too little of what the next octave holds: it is soft."""
DETAIL_TILE = 64
HASH_SIDE = 16
NEAR_DUPLICATE_FRACTION = 0.12
"""Fraction of differing bits of the difference hash up to which two pictures are the same (unrelated: 0.5)."""
FLAT_STANDARD_DEVIATION = 7.0
"""Of 255, of a crop's luma; skies and walls have less."""
SHARP_DETAIL = 6.0
"""A crop is out of focus or empty when 98 of 100 of its pixels have less detail than this in the finest octave (of
255; read off a contact sheet sorted by it: bokeh, skies and plain walls below, faces and clouds above)."""
CROPS_PER_PLAIN_CROP = 8
"""One plain crop is kept for this many that show something, so that the plain is learnt too."""


@dataclass(frozen=True)
class Picture:
    """A cleaned photograph (RGB), the size it came in, and the factor it was scaled by."""

    image: Image.Image
    original_size: tuple[int, int]
    scale: float


def clean_picture(path: Path) -> Picture | None:
    """Returns the photograph in ``path`` as RGB, scaled down as its quality demands; None when it is unusable.

    The longest side is limited to 2048. A picture with a short side of 512 or more that is a compressed JPEG (less
    than 3 bits per pixel) or a noisy one (more than 12) is halved, which hides compression and noise and sharpens;
    so is a soft one (little detail in its finest octave). A smaller soft picture, and a JPEG below 1000 pixels and
    1 bit per pixel, is left out.
    """
    with Image.open(path) as opened:
        size = opened.size
        scale = compression_scale(size, jpeg_bits_per_pixel(opened, path))
        if scale is None:
            return None
        opened.draft("RGB", scaled(size, scale))
        image = ImageOps.exif_transpose(to_rgb(opened))
    upright = size if (image.width >= image.height) == (size[0] >= size[1]) else size[::-1]
    image = shrink(image, scaled(upright, scale))
    if detail_ratio(image) < SOFT_DETAIL_RATIO:
        if min(image.size) < LARGE_SHORT_SIDE:
            return None
        scale /= 2
        image = shrink(image, scaled(upright, scale))
    return Picture(image, size, scale) if min(image.size) >= SMALLEST_SIDE else None


def jpeg_bits_per_pixel(opened: Image.Image, path: Path) -> float | None:
    """Returns the bits that a JPEG file spends on one pixel; None for other formats."""
    return 8 * path.stat().st_size / (opened.width * opened.height) if opened.format in ("JPEG", "MPO") else None


def compression_scale(size: tuple[int, int], bits_per_pixel: float | None) -> float | None:
    """Returns the factor (0..1] by which to scale a picture for its size and compression; None to leave it out."""
    limit = min(1.0, LONGEST_SIDE / max(size))
    if bits_per_pixel is None:
        return limit
    if min(size) < UNUSABLE_SHORT_SIDE and bits_per_pixel < UNUSABLE_BITS_PER_PIXEL:
        return None
    fine = COMPRESSED_BITS_PER_PIXEL <= bits_per_pixel <= NOISY_BITS_PER_PIXEL
    return limit if fine or min(size) < LARGE_SHORT_SIDE else min(limit, 0.5)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the picture as 8-bit RGB, transparency laid over black as it would show."""
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "LA", "PA") else image.convert("RGB")


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def luminance(image: Image.Image) -> np.ndarray:
    """Returns the luma of a picture: (H, W) float32 in [0, 255]."""
    return np.asarray(image.convert("L"), dtype=np.float32)


def halve(plane: np.ndarray) -> np.ndarray:
    """Returns (H, W) averaged over 2x2 blocks, an odd last row or column left out."""
    height, width = plane.shape[0] // 2 * 2, plane.shape[1] // 2 * 2
    return plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def octave(plane: np.ndarray) -> np.ndarray:
    """Returns the absolute detail that halving loses: (H/2*2, W/2*2)."""
    coarse = halve(plane).repeat(2, 0).repeat(2, 1)
    return np.abs(plane[: coarse.shape[0], : coarse.shape[1]] - coarse)


def detail_ratio(image: Image.Image) -> float:
    """Returns the detail of the finest octave over that of the next, in the busiest quarter of the picture's tiles.

    Measured on this collection: sharp photographs 0.65 to 1.2; soft or shallow-focus ones 0.5 to 0.6.
    """
    plane = luminance(image)
    fine, next_octave = octave(plane), octave(halve(plane))
    rows, columns = next_octave.shape[0] // (DETAIL_TILE // 2), next_octave.shape[1] // (DETAIL_TILE // 2)
    fine_tiles = tile_means(fine, rows, columns, DETAIL_TILE)
    next_tiles = tile_means(next_octave, rows, columns, DETAIL_TILE // 2)
    busiest = next_tiles >= np.quantile(next_tiles, 0.75)
    return float(fine_tiles[busiest].sum() / max(float(next_tiles[busiest].sum()), 1e-6))


def tile_means(plane: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """Returns the means of the plane's square tiles: (rows, columns)."""
    return plane[: rows * side, : columns * side].reshape(rows, side, columns, side).mean((1, 3))


def difference_hash(image: Image.Image) -> np.ndarray:
    """Returns the difference hash of a picture: 256 booleans, "brighter than its left neighbour"."""
    thumbnail = luminance(image.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX))
    return (thumbnail[:, 1:] > thumbnail[:, :-1]).ravel()


def is_near_duplicate(fingerprint: np.ndarray, others: list[np.ndarray]) -> bool:
    """Returns whether a difference hash is that of a picture among ``others``, up to scale and compression."""
    return any(float(np.mean(fingerprint != other)) <= NEAR_DUPLICATE_FRACTION for other in others)


def centre(image: Image.Image, width: float, height: float) -> Image.Image:
    """Returns the central part of a picture, ``width`` and ``height`` being fractions of its sides."""
    left, top = image.width * (1 - width) / 2, image.height * (1 - height) / 2
    return image.crop((round(left), round(top), round(image.width - left), round(image.height - top)))


def disjoint_crops(image: Image.Image, side: int, limit: int, random: np.random.Generator) -> list[np.ndarray]:
    """Returns at most ``limit`` disjoint crops (side, side, 3) uint8 from a centred grid.

    Plain ones (sky, wall, out of focus) are left out but for one to every eight that show something.
    """
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    top, left = (pixels.shape[0] - rows * side) // 2, (pixels.shape[1] - columns * side) // 2
    interesting: list[np.ndarray] = []
    plain: list[np.ndarray] = []
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * side, left + column * side
            crop = pixels[y : y + side, x : x + side]
            (plain if is_plain(crop) else interesting).append(crop)
    chosen = interesting + plain[: len(interesting) // CROPS_PER_PLAIN_CROP]
    if len(chosen) > limit:
        chosen = [chosen[index] for index in sorted(random.choice(len(chosen), limit, replace=False))]
    return chosen


def is_plain(crop: np.ndarray) -> bool:
    """Returns whether a crop (H, W, 3) uint8 shows next to nothing sharp: low contrast, or no fine detail."""
    plane = luminance(Image.fromarray(crop))
    return bool(plane.std() < FLAT_STANDARD_DEVIATION or np.quantile(octave(plane), 0.98) < SHARP_DETAIL)
