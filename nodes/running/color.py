"""The last step: exact size, colours and alpha of a result, or of a part of it as it will look in the whole."""

from __future__ import annotations

from torch import Tensor

from ...tadsr.color import (
    COLOR_MATCHES,
    WAVELET_REACH,
    colors,
    estimated_colors,
    is_neutral,
    match_colors,
    match_wavelet,
    to_neutral,
)
from ...tadsr.geometry import MIN_NETWORK_SIDE, Region, pad_to_multiple, resize_bicubic
from .pictures import RGB, join_alpha, split_alpha
from .run import Passage

LARGEST_MULTIPLE = 8  # SD VAE; the sides of padded pictures are multiples of this or less


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
    return around.intersection(Region(0, 0, *size))


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
    rgb = inside.relative_to(at).crop(decoded.whole[:, :RGB]).float()
    if color_match == "wavelet":
        rgb = match_wavelet(rgb, inside.crop(reference).to(rgb))
    elif color_match == "adain":
        assert decoded.sample is not None, "a part of a picture comes from tiles, which have a sample"
        sample = decoded.sample[:, :RGB].to(reference)
        padded, _ = pad_to_multiple(reference, downscale)
        same_copy = resize_bicubic(padded, (sample.shape[-2], sample.shape[-1]))
        wanted_colors = colors(reference)
        rgb = match_colors(rgb, estimated_colors(sample, same_copy, wanted_colors), wanted_colors)
    rgb = kept_grey(wanted.relative_to(inside).crop(rgb), reference, color_match)
    return join_alpha(rgb, None if alpha is None else wanted.crop(alpha))


def finish(result: Tensor, enlarged: Tensor, color_match: str) -> Tensor:
    """Returns the decoded result at the exact size of the enlarged input, in its colours, with its alpha.

    result: (1, C, H', W') in [0, 1], padded below and to the right; enlarged: (1, 3 or 4, H, W) in [0, 1]. What a
    colour match puts outside [0, 1] is left to `to_image`.
    """
    reference, alpha = split_alpha(enlarged)
    height, width = reference.shape[-2:]
    check_padding((result.shape[-2], result.shape[-1]), (height, width))
    rgb = result[:, :RGB, :height, :width].float()
    rgb = COLOR_MATCHES[color_match](rgb, reference.to(rgb))
    return join_alpha(kept_grey(rgb, reference, color_match), alpha)


def kept_grey(rgb: Tensor, reference: Tensor, color_match: str) -> Tensor:
    """Returns a result, or a part of one, as grey as the whole reference is, unless its colours are not matched."""
    return to_neutral(rgb) if color_match != "none" and is_neutral(reference) else rgb


def check_padding(size: tuple[int, int], reference: tuple[int, int]) -> None:
    """Raises ValueError unless `size` (height, width) is the reference's with padding."""
    limits = [max(side, MIN_NETWORK_SIDE) + LARGEST_MULTIPLE for side in reference]
    if not all(side <= padded < limit for side, padded, limit in zip(reference, size, limits, strict=True)):
        raise ValueError(
            f"the decoded picture is {size[1]}x{size[0]} pixels and the reference {reference[1]}x{reference[0]}; "
            f"accepted is a decoded picture of {reference[1]}x{reference[0]} to {limits[1] - 1}x{limits[0] - 1} "
            "pixels. Connect the enlarged image of Time-Aware Encode as reference, and decode with the VAE of "
            "Load TADSR Model"
        )
