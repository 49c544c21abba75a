"""The samples that tadsr-mini learns from, a folder that `scripts/mini_samples.py` writes.

It holds arrays: `hq.npy` (N, 256, 256, 3), photographs; `lq.npy` (N, 64, 64, 3), the same degraded;
`teacher.npy` (N, 256, 256, 3), what an open upscaler makes of the latter; `kind.npy` (N,), see `Kind`; `done.npy`
(N,), 1 where the teacher's picture is there. All uint8. `patches.safetensors` holds the latents' components. The
teachers take seconds a picture; a stopped run goes on where it was, and a training may read the folder meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from training.data.samples import shrink
from training.degradation import FULL, LIGHT, degrade
from training.images import BYTE_MAX

SIDE, SCALE = 256, 4
PATCHES = "patches.safetensors"
SEED = 20261125


class Kind(IntEnum):
    """How a sample was degraded."""

    PLAIN = 0
    """Four times smaller by an antialiased cubic."""
    LIGHT = 1
    """Light noise or compression besides."""
    FULL = 2
    """Real-ESRGAN's second-order degradation."""


PATTERN = (Kind.FULL, Kind.PLAIN, Kind.FULL, Kind.LIGHT, Kind.FULL, Kind.PLAIN, Kind.FULL, Kind.PLAIN)
"""Of the samples in their order: half are fully degraded."""


def make_sample(crop: np.ndarray, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns HQ and LQ of a crop, all uint8; the crop is turned and mirrored at random."""
    hq = np.ascontiguousarray(np.rot90(crop, int(rng.integers(4))))
    if rng.integers(2):
        hq = np.ascontiguousarray(hq[:, ::-1])
    if kind is Kind.PLAIN:
        return hq, shrink(hq, SCALE)
    config = LIGHT if kind is Kind.LIGHT else FULL
    return hq, degrade(hq.astype(np.float32) / BYTE_MAX, rng, config)


def open_arrays(folder: Path, count: int = 0, writable: bool = False) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder, mapped into memory; with `count`, made anew where they are not there."""
    shapes = {"hq": (SIDE, SIDE, 3), "lq": (SIDE // SCALE, SIDE // SCALE, 3), "teacher": (SIDE, SIDE, 3)}
    arrays = {}
    for name in ("hq", "lq", "teacher", "kind", "done", "made"):
        path = folder / f"{name}.npy"
        if count and not path.is_file():
            open_memmap(path, "w+", np.uint8, (count, *shapes.get(name, ()))).flush()
        arrays[name] = np.load(path, mmap_mode="r+" if writable else "r")
    return arrays


def write_samples(arrays: dict[str, np.ndarray], crops: np.ndarray, indices: Iterable[int]) -> None:
    """Writes the photographs `indices` and their degraded versions, as far as they are not there."""
    for index in indices:
        if arrays["made"][index]:
            continue
        rng = np.random.default_rng((SEED, index))
        kind = PATTERN[index % len(PATTERN)]
        arrays["hq"][index], arrays["lq"][index] = make_sample(crops[index % len(crops)], kind, rng)
        arrays["kind"][index] = kind
        arrays["made"][index] = 1
