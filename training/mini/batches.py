"""Batches of crops from the arrays that `training.mini.samples` writes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadsr.geometry import enlarge, resize_bicubic
from training.images import BYTE_MAX
from training.mini.samples import SCALE, open_arrays

MARGIN = 4  # LQ pixels around a crop, so that its enlargement does not end at its border
OTHER_SCALES = (1.0, 4 / 3, 2.0, 3.0)


class Batch(NamedTuple):
    """lq: enlarged; photograph; teacher: what the upscaler makes of it, the photograph where there is none yet.

    Each (B, 3, S, S) in [-1, 1].
    """

    lq: Tensor
    photograph: Tensor
    teacher: Tensor


def _image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / BYTE_MAX


class Batches:
    """Random batches; the folder may still be growing."""

    def __init__(self, folder: Path, side: int, other_scale: float, shifted: float, untaught: float) -> None:
        """side: pixels; shares of samples: of another scale than 4, of shifted ones, of those without a teacher."""
        self.arrays = open_arrays(folder)
        self.side, self.other_scale, self.shifted, self.untaught = side, other_scale, shifted, untaught

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """Returns `count` samples, drawn from `rng`."""
        done, made = np.flatnonzero(self.arrays["done"]), np.flatnonzero(self.arrays["made"])
        samples = []
        for _ in range(count):
            if rng.random() < self.other_scale:
                samples.append(self._rescaled(int(rng.choice(made)), rng))
            else:
                taught = len(done) and rng.random() >= self.untaught
                samples.append(self._sample(int(rng.choice(done if taught else made)), rng))
        return Batch(*(torch.cat(pictures) * 2 - 1 for pictures in zip(*samples, strict=True)))

    def _sample(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        small, whole = self.side // SCALE, self.arrays["lq"].shape[1]
        shift = rng.integers(SCALE, size=2) if rng.random() < self.shifted else np.zeros(2, int)
        y, x = rng.integers(0, whole - small - (shift > 0) + 1)
        mirrored = rng.random() < 0.5
        y0, x0 = max(0, y - MARGIN), max(0, x - MARGIN)
        y1, x1 = (min(whole, start + small + 1 + MARGIN) for start in (y, x))
        part = _image(self.arrays["lq"][index, y0:y1, x0:x1])
        large = enlarge(part, (SCALE * part.shape[2], SCALE * part.shape[3]))
        top, left = SCALE * (y - y0) + shift[0], SCALE * (x - x0) + shift[1]
        lq = large[:, :, top : top + self.side, left : left + self.side]
        top, left = SCALE * y + shift[0], SCALE * x + shift[1]
        place = (index, slice(top, top + self.side), slice(left, left + self.side))
        taught = bool(self.arrays["done"][index])
        photograph = _image(self.arrays["hq"][place])
        teacher = _image(self.arrays["teacher"][place]) if taught else photograph
        if mirrored:
            lq, photograph, teacher = lq.flip(3), photograph.flip(3), teacher.flip(3)
        return lq, photograph, teacher

    def _rescaled(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A photograph that was shrunk by less than 4, which needs less or nothing."""
        whole = self.arrays["hq"].shape[1]
        y, x = rng.integers(0, whole - self.side + 1, size=2)
        photograph = _image(self.arrays["hq"][index, y : y + self.side, x : x + self.side])
        small = round(self.side / float(rng.choice(OTHER_SCALES)))
        lq = enlarge(resize_bicubic(photograph, (small, small)).clamp(0, 1), (self.side, self.side))
        return lq, photograph, photograph
