"""Constant colours for numbered frames: each result gets the statistics of a window of frames around its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np

from ..pictures import as_image, read_content, read_picture
from ..results import Recolor, Statistics

_CACHED = 512  # frames whose statistics are kept: twelve numbers each


def window_statistics(sources: Sequence[str], index: int, window: int) -> Statistics:
    """Returns the mean over `window` frames (index in their middle, fewer at the ends) of each one's statistics.

    Frames that cannot be read, or are in another folder, do not count. Raises PictureError for the frame itself.
    """
    folder = Path(sources[index]).parent
    near = range(max(0, index - window // 2), min(len(sources), index + window // 2 + 1))
    rows = [statistics(sources[index])]
    for other in near:
        if other != index and Path(sources[other]).parent == folder:
            rows += _if_readable(sources[other])
    mean = np.mean(np.array(rows), axis=0)
    return cast(Statistics, tuple(tuple(float(value) for value in row) for row in mean))


def _if_readable(source: str) -> list[Statistics]:
    try:
        return [statistics(source)]
    except RuntimeError:  # reported when its own turn comes
        return []


@lru_cache(maxsize=_CACHED)
def statistics(source: str) -> Statistics:
    """Returns mean and standard deviation of red, green and blue of a picture's file, of 0..255."""
    image = as_image(read_picture(read_content(source)).pixels)
    pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"), dtype=np.float64)
    return cast(Statistics, tuple(tuple(row.tolist()) for row in _mean_and_deviation(pixels)))


def recolored(colors: Statistics) -> Recolor:
    """Returns what gives RGB of (H, W, 3 or 4) uint8 or uint16 this mean and deviation (arXiv 1703.06868, eq. 8)."""

    def change(pixels: np.ndarray) -> np.ndarray:
        top = np.iinfo(pixels.dtype).max
        mean, deviation = (np.array(row) * top / 255 for row in colors)
        values = pixels.astype(np.float32)
        own_mean, own_deviation = _mean_and_deviation(values)
        matched = (values[..., :3] - own_mean) / np.maximum(own_deviation, 1e-6) * deviation + mean
        return np.rint(matched).clip(0, top).astype(pixels.dtype)

    return change


def _mean_and_deviation(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both of red, green and blue; a pixel counts as much as alpha, the fourth channel, lets it be seen."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    weights = flat[:, 3] if flat.shape[1] > 3 and flat[:, 3].any() else None
    mean = np.average(flat[:, :3], axis=0, weights=weights)
    return mean, np.sqrt(np.average((flat[:, :3] - mean) ** 2, axis=0, weights=weights))
