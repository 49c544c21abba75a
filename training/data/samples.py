"""From a photograph to a pair for training or validation: crop, flip, degradation, enlargement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tadsr.geometry import enlarge, resize_bicubic
from training.data.pictures import DataError, Picture, PictureError, decode, describe_damage
from training.data.storage import ByteRange
from training.degradation import (
    FULL,
    LIGHT,
    DegradationConfig,
    DegradationParameters,
    degrade,
    draw_parameters,
)
from training.degradation.apply import to_bytes
from training.images import BYTE_MAX, to_tensor


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How samples are made; shares and probabilities in 0..1."""

    crop: int  # side of a sample in pixels, a multiple of scale
    scale: int = 4  # how many times smaller the low-quality picture is; paper, section 4.1
    flip: float = 0.0  # probability of a flip left to right
    plain_bicubic_share: float = 0.0  # of samples whose LQ is the HQ shrunk and enlarged, nothing else
    light_share: float = 0.0  # of the other degraded samples: those with the light degradation
    degrade_later: bool = False  # degradations are only drawn; the training device computes them

    def __post_init__(self) -> None:
        if self.scale < 1 or self.crop < self.scale or self.crop % self.scale:
            raise DataError(f"crop is {self.crop} and scale {self.scale}; accepted: a crop that is a multiple of scale")


class DegradedPair(NamedTuple):
    """A pair (3, crop, crop) in [-1, 1]; with a degradation, that is still to be applied: lq is the undegraded hq."""

    lq: Tensor
    hq: Tensor
    degradation: DegradationParameters | None = None


def random_pair(picture: Picture, options: SampleOptions, rng: np.random.Generator) -> DegradedPair:
    """Returns a random part of a picture, all drawn from `rng`; raises PictureError if it cannot be read."""
    hq, lq, grid = _read(picture, options)
    places = [int(rng.integers(0, (side - options.crop) // grid, endpoint=True)) for side in hq.shape[:2]]
    hq, lq = _cut(hq, lq, grid, places, options.crop)
    if rng.random() < options.flip:
        hq, lq = hq[:, ::-1], None if lq is None else lq[:, ::-1]
    if rng.random() < options.plain_bicubic_share:
        lq = shrink(hq, options.scale)
    elif lq is None:
        config = _degradation(options, light=rng.random() < options.light_share)
        if options.degrade_later:
            target = _to_tensor(hq, options.crop)
            return DegradedPair(target, target, draw_parameters(rng, config))
        lq = degrade(_to_unit(hq), rng, config)
    return DegradedPair(_to_tensor(lq, options.crop), _to_tensor(hq, options.crop))


def centre_pair(picture: Picture, options: SampleOptions, rng: np.random.Generator) -> DegradedPair:
    """Returns the picture's centre, with the full degradation, otherwise as `random_pair`."""
    hq, lq, grid = _read(picture, options)
    places = [(side - options.crop) // grid // 2 for side in hq.shape[:2]]
    hq, lq = _cut(hq, lq, grid, places, options.crop)
    if lq is None:
        lq = degrade(_to_unit(hq), rng, _degradation(options, light=False))
    return DegradedPair(_to_tensor(lq, options.crop), _to_tensor(hq, options.crop))


def shrink(hq: np.ndarray, scale: int) -> np.ndarray:
    """Returns `hq`, uint8 (H, W, 3), `scale` times smaller by an antialiased cubic, uint8."""
    small = resize_bicubic(to_tensor(hq), (hq.shape[0] // scale, hq.shape[1] // scale))
    return to_bytes(small[0].permute(1, 2, 0).numpy())


def _read(picture: Picture, options: SampleOptions) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Returns HQ, LQ if the picture has one, and the grid on which crops lie: HQ pixels in an LQ pixel."""
    hq = _read_range(picture.hq)
    if min(hq.shape[:2]) < options.crop:
        raise PictureError(f"is {hq.shape[1]}x{hq.shape[0]} pixels, smaller than the crop of {options.crop}")
    if picture.lq is None:
        return hq, None, 1
    lq = _read_range(picture.lq)
    grid = hq.shape[0] // lq.shape[0]
    if grid not in (1, options.scale) or hq.shape != (grid * lq.shape[0], grid * lq.shape[1], 3):
        raise PictureError(f"is {hq.shape[1]}x{hq.shape[0]} pixels, and its LQ {lq.shape[1]}x{lq.shape[0]}")
    return hq, lq, grid


def _read_range(place: ByteRange) -> np.ndarray:
    try:
        data = place.read()
    except OSError as error:
        raise PictureError(describe_damage(error)) from error
    return decode(data)


def _cut(
    hq: np.ndarray, lq: np.ndarray | None, grid: int, places: list[int], crop: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the same part of both; places: row and column of its corner, in LQ pixels."""
    top, left = places
    hq = hq[grid * top : grid * top + crop, grid * left : grid * left + crop]
    side = crop // grid
    return hq, None if lq is None else lq[top : top + side, left : left + side]


def _degradation(options: SampleOptions, light: bool) -> DegradationConfig:
    return replace(LIGHT if light else FULL, downscale=options.scale)


def _to_unit(image: np.ndarray) -> np.ndarray:
    """Returns uint8 as float32 in [0, 1]."""
    return np.ascontiguousarray(image, dtype=np.float32) / BYTE_MAX


def _to_tensor(image: np.ndarray, crop: int) -> Tensor:
    """Returns uint8 (h, w, 3), enlarged as the nodes do it where it is smaller, as (3, crop, crop) in [-1, 1]."""
    return (enlarge(to_tensor(image), (crop, crop))[0] * 2 - 1).contiguous()
