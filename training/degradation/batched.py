"""Degradation of a batch of photographs by drawn parameters, in plain torch, for a GPU where there is one.

    parameters = [draw_parameters(numpy.random.default_rng((seed, index))) for index in indices]
    lq = degrade_batch(hq, parameters, seeds)

Random resizes make nearly all sizes between input and output differ, so the photographs go one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parameters import DegradationParameters
from .pipeline import Operators
from .torch_jpeg import compress_jpeg, to_levels
from .torch_operators import add_noise, blur, resize

OPERATORS = Operators(blur, resize, add_noise, compress_jpeg)


@torch.no_grad()
def degrade_batch(hq: Tensor, parameters: Sequence[DegradationParameters], seeds: Sequence[int]) -> Tensor:
    """Returns the degradations of `hq`, on its device: float32 (B, 3, H/4, W/4) in [0, 1], multiples of 1/255.

    hq: float32 (B, 3, H, W) RGB in [0, 1], H and W multiples of the parameters' downscale, which is one for all.
    seeds: of each photograph's noise. The same parameters give the picture of `apply` but for the noise, of which
    a seed gives another one on another kind of device, and for single levels of JPEG. What a photograph becomes
    does not depend on the others of the batch. Raises ValueError for anything else.
    """
    _check_batch(hq, parameters, seeds)
    size = (hq.shape[2], hq.shape[3])
    with torch.autocast(hq.device.type, enabled=False):
        images = [
            OPERATORS.run(photograph[None], size, drawn, torch.Generator(hq.device).manual_seed(seed))
            for photograph, drawn, seed in zip(hq, parameters, seeds, strict=True)
        ]
        return to_levels(torch.cat(images)).float() / 255


def _check_batch(hq: Tensor, parameters: Sequence[DegradationParameters], seeds: Sequence[int]) -> None:
    if hq.ndim != 4 or hq.shape[1] != 3 or hq.dtype != torch.float32 or hq.numel() == 0:
        raise ValueError(
            f"the photographs are {tuple(hq.shape)}, {hq.dtype}; accepted: float32 (B, 3, H, W), not empty"
        )
    if not len(hq) == len(parameters) == len(seeds):
        raise ValueError(
            f"got {len(hq)} photographs, {len(parameters)} parameters and {len(seeds)} seeds; accepted: equal"
        )
    downscales = sorted({drawn.downscale for drawn in parameters})
    height, width = hq.shape[2:]
    if len(downscales) > 1 or height % downscales[0] or width % downscales[0]:
        raise ValueError(
            f"the photographs are {height}x{width}; accepted: multiples of one downscale, got {downscales}"
        )
    low, high = (float(value) for value in hq.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"the photographs' values are {low}..{high}; accepted: 0..1")
