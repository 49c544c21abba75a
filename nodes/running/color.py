"""The last step: exact size, colours and alpha of a result, or of a part of it as it will look in the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...tadsr.color import (
    COLOR_MATCHES,
    DEFAULT_COLOR_MATCH,
    WAVELET_REACH,
    colors,
    estimated_colors,
    is_neutral,
    lab_to_rgb,
    match_colors,
    match_wavelet,
    rgb_to_lab,
    to_neutral,
)
from ...tadsr.geometry import MIN_NETWORK_SIDE, Region, pad_to_multiple, resize_bicubic
from .pictures import RGB, StageData, join_alpha, split_alpha

# Where mean and contrast are matched: from RGB there and back
SPACES = {"adain": (lambda rgb: rgb, lambda rgb: rgb), "lab": (rgb_to_lab, lab_to_rgb)}
LARGEST_MULTIPLE = 8  # SD VAE; the sides of padded pictures are multiples of this or less


@dataclass(frozen=True)
class ColorMatch:
    """How a result takes its colours from the enlarged input."""

    method: str = DEFAULT_COLOR_MATCH  # a name of COLOR_MATCHES
    strength: float = 1.0  # 0..1: 0 leaves the result alone

    def __post_init__(self) -> None:
        if self.method not in COLOR_MATCHES:
            raise ValueError(f"color_match is {self.method!r}; accepted are {', '.join(COLOR_MATCHES)}")
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"color_strength is {self.strength:g}; accepted are 0 (none) to 1 (all)")

    def mixed(self, plain: Tensor, matched: Tensor) -> Tensor:
        """Returns the result between what it was and what the match made of it."""
        return matched if self.strength == 1.0 or matched is plain else plain.lerp(matched, self.strength)


def expanded(region: Region, size: tuple[int, int]) -> Region:
    """Returns the region with what the wavelet colour match looks at around it, inside the picture."""
    around = Region(
        region.top - WAVELET_REACH,
        region.left - WAVELET_REACH,
        region.height + 2 * WAVELET_REACH,
        region.width + 2 * WAVELET_REACH,
    )
    return around.intersection(Region(0, 0, *size))


def finish_part(
    decoded: StageData, at: Region, wanted: Region, enlarged: Tensor, downscale: int, match: ColorMatch
) -> Tensor:
    """Returns a part of the result in the colours that it will have in the whole, with its alpha; (1, 3 or 4, h, w).

    decoded: the part of the picture at `at`, and the thumbnail; wanted: the part of it to return; both in pixels.
    enlarged: the whole enlarged input, (1, 3 or 4, H, W) in [0, 1]; it was padded to a multiple of `downscale`.
    """
    reference, alpha = split_alpha(enlarged)
    inside = expanded(wanted, (reference.shape[-2], reference.shape[-1]))
    plain = inside.relative_to(at).crop(decoded.full[:, :RGB]).float()
    rgb = plain
    if match.method == "wavelet":
        rgb = match_wavelet(plain, inside.crop(reference).to(plain), None if alpha is None else inside.crop(alpha))
    elif match.method in SPACES:
        assert decoded.thumbnail is not None, "a part of a picture comes from tiles, which have a thumbnail"
        thumbnail = decoded.thumbnail[:, :RGB].to(reference)
        padded, _ = pad_to_multiple(enlarged, downscale)
        same_copy = resize_bicubic(padded, (thumbnail.shape[-2], thumbnail.shape[-1]))
        small_reference, small_alpha = split_alpha(same_copy)
        there, back = SPACES[match.method]
        wanted_colors = colors(there(reference), alpha)
        small_alpha = None if small_alpha is None else small_alpha.clamp(0.0, 1.0)
        own = estimated_colors(there(thumbnail), there(small_reference), wanted_colors, small_alpha)
        rgb = back(match_colors(there(plain).clone(), own, wanted_colors))
    rgb = wanted.relative_to(inside).crop(match.mixed(plain, rgb))
    return join_alpha(kept_grey(rgb, enlarged, match.method), None if alpha is None else wanted.crop(alpha))


def finish(result: Tensor, enlarged: Tensor, match: ColorMatch) -> Tensor:
    """Returns the decoded result at the exact size of the enlarged input, in its colours, with its alpha.

    result: (1, C, H', W') in [0, 1], padded below and to the right; enlarged: (1, 3 or 4, H, W) in [0, 1]. What a
    colour match puts outside [0, 1] is left to `to_image`.
    """
    reference, alpha = split_alpha(enlarged)
    height, width = reference.shape[-2:]
    check_padding((result.shape[-2], result.shape[-1]), (height, width))
    plain = result[:, :RGB, :height, :width].float()
    seen = None if alpha is None else alpha.to(plain)
    rgb = match.mixed(plain, COLOR_MATCHES[match.method](plain, reference.to(plain), seen))
    return join_alpha(kept_grey(rgb, enlarged, match.method), alpha)


def kept_grey(rgb: Tensor, enlarged: Tensor, color_match: str) -> Tensor:
    """Returns a result, or a part of one, as grey as the whole input is, unless its colours are not matched."""
    return to_neutral(rgb) if color_match != "none" and is_neutral(*split_alpha(enlarged)) else rgb


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
