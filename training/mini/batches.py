"""Batches of crops from the arrays that `training.mini.samples` writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadsr.geometry import enlarge, resize_bicubic
from training.images import BYTE_MAX
from training.mini.samples import SCALE, SIDE, open_arrays

OTHER_SCALES = (1.0, 4 / 3, 2.0, 3.0)


class Batch(NamedTuple):
    """lq: enlarged; photograph; teacher: what the upscaler makes of it, the photograph where there is none yet.

    Each (B, 3, S, S) in [-1, 1].
    """

    lq: Tensor
    photograph: Tensor
    teacher: Tensor


class Batches:
    """Random batches; on a processor the folder may still be growing, a GPU takes what is there."""

    def __init__(
        self, folder: Path, side: int, other_scale: float, shifted: float, untaught: float, device: torch.device
    ) -> None:
        """side: pixels; shares of samples: of another scale than 4, of shifted ones, of those without a teacher."""
        self.arrays = open_arrays(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            self.hq, self.lq, self.teacher = (
                torch.from_numpy(self.arrays[name]).to(device) for name in ("hq", "lq", "teacher")
            )
        self.side, self.other_scale, self.shifted, self.untaught = side, other_scale, shifted, untaught
        self.device = device

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """Returns `count` samples, drawn from `rng`."""
        others = int(rng.binomial(count, self.other_scale))
        parts = [self._samples(count - others, rng)] if others < count else []
        shares = rng.multinomial(others, [1 / len(OTHER_SCALES)] * len(OTHER_SCALES))
        parts += [self._rescaled(int(n), scale, rng) for n, scale in zip(shares, OTHER_SCALES, strict=True) if n]
        mirrored = self._to_device(rng.random(count) < 0.5)[:, None, None, None]
        pictures = (torch.cat(pictures) * 2 - 1 for pictures in zip(*parts, strict=True))
        return Batch(*(torch.where(mirrored, picture.flip(3), picture) for picture in pictures))

    def _samples(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        done, made = np.flatnonzero(self.arrays["done"]), np.flatnonzero(self.arrays["made"])
        index = rng.choice(made, count)
        if len(done):
            index = np.where(rng.random(count) < self.untaught, index, rng.choice(done, count))
        shift = rng.integers(SCALE, size=(count, 2)) * (rng.random((count, 1)) < self.shifted)
        places = (SIDE - self.side) // SCALE + 1 - (shift > 0)
        corner = SCALE * (rng.random((count, 2)) * places).astype(int) + shift
        taught = self._to_device(self.arrays["done"][index] == 1)[:, None, None, None]
        index, corner = self._to_device(index), self._to_device(corner)
        large = enlarge(_image(self.lq[index]), (SIDE, SIDE)).permute(0, 2, 3, 1)
        photograph = _image(self._crops(self.hq, index, corner))
        teacher = _image(self._crops(self.teacher, index, corner))
        lq = self._crops(large, torch.arange(count, device=self.device), corner).permute(0, 3, 1, 2)
        return lq, photograph, torch.where(taught, teacher, photograph)

    def _rescaled(self, count: int, scale: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Photographs that were shrunk by less than 4, which need less or nothing."""
        index = self._to_device(rng.choice(np.flatnonzero(self.arrays["made"]), count))
        corner = self._to_device(rng.integers(0, SIDE - self.side + 1, size=(count, 2)))
        photograph = _image(self._crops(self.hq, index, corner))
        small = round(self.side / scale)
        lq = enlarge(resize_bicubic(photograph, (small, small)).clamp(0, 1), (self.side, self.side))
        return lq, photograph, photograph

    def _crops(self, pictures: Tensor, index: Tensor, corner: Tensor) -> Tensor:
        """Returns (B, S, S, 3) of pictures (N, H, W, 3). index: (B,); corner: (B, 2), top and left."""
        along = torch.arange(self.side, device=self.device)
        rows, columns = corner[:, :1] + along, corner[:, 1:] + along
        return pictures[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)


def _image(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / BYTE_MAX
