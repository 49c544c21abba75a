"""Crop preview: a part of the result, finished as it will look in the whole."""

from __future__ import annotations

from torch import Tensor

from ..tadsr.color import (
    WAVELET_REACH,
    colours,
    estimated_colours,
    match_colours,
    match_wavelet,
)
from ..tadsr.geometry import Region, pad_to_multiple, resize_bicubic
from .images import RGB, join_alpha, split_alpha
from .phase_run import Passage
from .phases import kept_grey


def centre_region(size: tuple[int, int], side: int) -> Region | None:
    """Returns the centre of a result of `size` (height, width), `side` pixels square at most; None for side 0."""
    if side < 0:
        raise ValueError(f"preview_size is {side}; accepted are 0 (the whole result) and more")
    if side == 0:
        return None
    height, width = (min(side, length) for length in size)
    return Region((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def grown(region: Region, size: tuple[int, int]) -> Region:
    """Returns the region with what the wavelet colour match looks at around it, inside the picture."""
    around = Region(
        region.top - WAVELET_REACH,
        region.left - WAVELET_REACH,
        region.height + 2 * WAVELET_REACH,
        region.width + 2 * WAVELET_REACH,
    )
    return around.common(Region(0, 0, *size))


def finish_part(
    decoded: Passage, at: Region, wanted: Region, enlarged: Tensor, downscale: int, color_match: str
) -> Tensor:
    """Returns a part of the result in the colours that it will have in the whole, with its alpha; (1, 3 or 4, h, w).

    decoded: the part of the picture at `at`, which is changed, and the decoded sample; wanted: the part of it to
    return; both in pixels. enlarged: the whole enlarged input, (1, 3 or 4, H, W) in [0, 1]; it was padded
    to a multiple of `downscale`.
    """
    reference, alpha = split_alpha(enlarged)
    inside = grown(wanted, (reference.shape[-2], reference.shape[-1]))
    rgb = inside.relative_to(at).of(decoded.whole[:, :RGB]).float()
    if color_match == "wavelet":
        rgb = match_wavelet(rgb, inside.of(reference).to(rgb))
    elif color_match == "adain":
        assert decoded.sample is not None, "a part of a picture comes from tiles, which have a sample"
        sample = decoded.sample[:, :RGB].to(reference)
        padded, _ = pad_to_multiple(reference, downscale)
        same_copy = resize_bicubic(padded, (sample.shape[-2], sample.shape[-1]))
        wanted_colours = colours(reference)
        rgb = match_colours(rgb, estimated_colours(sample, same_copy, wanted_colours), wanted_colours)
    rgb = kept_grey(wanted.relative_to(inside).of(rgb), reference, color_match)
    return join_alpha(rgb, None if alpha is None else wanted.of(alpha))
