"""Degradation of a batch of photographs by drawn parameters, in plain torch, for a GPU where there is one.

    parameters = [draw_parameters(numpy.random.default_rng((seed, index))) for index in indices]
    lq = degrade_batch(hq, parameters, seeds)

Random resizes make nearly all sizes between input and output differ, so the photographs go one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parameters import DegradationParameters, StageParameters
from .torch_jpeg import compress_jpeg, to_levels
from .torch_operators import add_noise, blur, resize


@torch.no_grad()
def degrade_batch(hq: Tensor, parameters: Sequence[DegradationParameters], seeds: Sequence[int]) -> Tensor:
    """Returns the degradations of `hq`, on its device: float32 (B, 3, H/4, W/4) in [0, 1], multiples of 1/255.

    hq: float32 (B, 3, H, W) RGB in [0, 1], H and W multiples of the parameters' downscale, which is one for all.
    seeds: of each photograph's noise. The same parameters give the picture of `apply` but for the noise, of which
    a seed gives another one on another kind of device, and for single levels of JPEG. What a photograph becomes
    does not depend on the others of the batch. Raises ValueError for anything else.
    """
    _check_batch(hq, parameters, seeds)
    with torch.autocast(hq.device.type, enabled=False):
        images = [
            _degrade(photograph[None], drawn, torch.Generator(hq.device).manual_seed(seed))
            for photograph, drawn, seed in zip(hq, parameters, seeds, strict=True)
        ]
    return torch.cat(images)


def _degrade(image: Tensor, parameters: DegradationParameters, generator: torch.Generator) -> Tensor:
    height, width = image.shape[2:]
    target = height // parameters.downscale, width // parameters.downscale
    if parameters.first is not None:
        image = _apply_stage(image, parameters.first, (height, width), generator)
        image = compress_jpeg(image, parameters.first_quality)
    image = _apply_stage(image, parameters.second, target, generator)
    if parameters.jpeg_before_resize:
        image = compress_jpeg(image, parameters.final_quality)
        image = _resize_finally(image, target, parameters)
    else:
        image = _resize_finally(image, target, parameters)
        image = compress_jpeg(image, parameters.final_quality)
    return to_levels(image).float() / 255


def _apply_stage(
    image: Tensor, parameters: StageParameters, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    if parameters.kernel is not None:
        image = blur(image, parameters.kernel)
    step = parameters.resize
    height, width = (max(1, int(side * step.scale)) for side in size)
    image = resize(image, height, width, step.mode, step.antialias)
    return add_noise(image, parameters.noise, generator)


def _resize_finally(image: Tensor, target: tuple[int, int], parameters: DegradationParameters) -> Tensor:
    image = resize(image, *target, parameters.final_mode, parameters.final_antialias)
    return image if parameters.final_kernel is None else blur(image, parameters.final_kernel)


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
