"""What happens to one picture before, between and after the networks. All nodes call these."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from torch import Tensor

from ..tadsr.color import COLOUR_MATCHES, is_neutral, to_neutral
from ..tadsr.encoder import mode, sample
from ..tadsr.geometry import MIN_NETWORK_SIDE, enlarge, pad_to_multiple, resize_bicubic, target_size
from .compat import intermediate_dtype
from .images import RGB, join_alpha, split_alpha, to_planes
from .phase_run import Passage

LARGEST_MULTIPLE = 8  # SD VAE; the sides of padded pictures are multiples of this or less


def result_size(image: Tensor, scale: float, width: int, height: int) -> tuple[int, int]:
    """Returns (height, width) of the result. image: (B, H, W, C); width, height: 0 for the scale's."""
    return target_size(image.shape[1], image.shape[2], scale=scale, target=(height, width))


def enlarge_picture(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the picture enlarged to `size`, its alpha too: (H, W, C) in [0, 1] -> (1, 3 or 4, *size)."""
    return enlarge(to_planes(picture), size)


def start(enlarged: Tensor, downscale: int, sample: tuple[int, int] | None = None) -> Passage:
    """Returns an enlarged picture ready for the encoder, padded as the networks need. enlarged: (1, 3 or 4, H, W).

    sample: (height, width) in latent pixels of the smaller copy that gives statistics to all phases, if they need one.
    """
    padded, _ = pad_to_multiple(enlarged[:, :RGB], downscale)
    if sample is None:
        return Passage(padded)
    return Passage(padded, resize_bicubic(padded, (sample[0] * downscale, sample[1] * downscale)).clamp(0.0, 1.0))


def draw_latent(moments: Tensor, seed: int | None) -> Tensor:
    """Returns the latent, (B, C, h, w), as other nodes have it: the mode, or with a seed a draw from the distribution.

    moments: (B, 2 C, h, w) float32, mean and log-variance.
    """
    if seed is None:
        latent = mode(moments)
    else:
        # Drawn on the CPU, so that a seed gives the same picture on every machine.
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(mode(moments).shape, generator=generator)
        latent = sample(moments, noise.to(moments))
    return latent.to(device=mm.intermediate_device(), dtype=intermediate_dtype())


def finish(result: Tensor, enlarged: Tensor, color_match: str) -> Tensor:
    """Returns the decoded result at the exact size of the enlarged input, in its colours, with its alpha.

    result: (1, C, H', W') in [0, 1], padded below and to the right; enlarged: (1, 3 or 4, H, W) in [0, 1]. What a
    colour match puts outside [0, 1] is left to `to_image`.
    """
    reference, alpha = split_alpha(enlarged)
    height, width = reference.shape[-2:]
    check_padding((result.shape[-2], result.shape[-1]), (height, width))
    rgb = result[:, :RGB, :height, :width].float()
    rgb = COLOUR_MATCHES[color_match](rgb, reference.to(rgb))
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
