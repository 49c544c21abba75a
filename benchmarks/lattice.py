"""Measures a lattice of 4 pixels in a picture, which upsampling leaves: `python -m benchmarks.lattice PICTURE...`.

`lattice`: squared second differences of luma by their phase modulo 4, largest over mean, the worse of both directions;
1 is none. It sees what the eye takes for a weave over leaves and soft backgrounds. `comb`: power at the lattice's
frequencies over the median of that around them. Photographs have about 1.02 (worst of twelve: 1.07) and 1.3 (3.6),
Lanczos' enlargement 1.25 and 17.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from training.images import BYTE_MAX, to_tensor
from training.metrics.reference import luma

PERIOD = 4  # pixels
WINDOW, STEP = 64, 32  # pixels, of the spectra
NEAR, FAR = 3, 6  # bins: what lies around a frequency of the lattice
MOST_LATTICE, MOST_COMB = 1.1, 5.0  # of the medians of a dozen pictures: more can be seen
FLAT = 1e-9  # a flat picture has no lattice


def lattice(pixels: np.ndarray) -> float:
    """Returns the largest share of a phase, times 4: 1..4. pixels: uint8 (H, W, 3), sides from 6."""
    values = _luma(pixels)
    return max(_largest_share(values), _largest_share(values.T))


def _largest_share(values: np.ndarray) -> float:
    second = np.diff(values, 2, axis=1) ** 2
    energy = second[:, : second.shape[1] // PERIOD * PERIOD].reshape(len(second), -1, PERIOD).mean((0, 1))
    return float(energy.max() / energy.mean()) if energy.mean() > FLAT else 1.0


def comb(pixels: np.ndarray) -> float:
    """Returns the power at the strongest of the lattice's frequencies over that around it; NaN under 64x64.

    pixels: uint8 (H, W, 3).
    """
    values = _luma(pixels)
    if min(values.shape) < WINDOW:
        return float("nan")
    windows = sliding_window_view(values, (WINDOW, WINDOW))[::STEP, ::STEP].reshape(-1, WINDOW, WINDOW)
    hann = np.hanning(WINDOW)
    windows = (windows - windows.mean((1, 2), keepdims=True)) * np.outer(hann, hann)
    power = (np.abs(np.fft.fft2(windows)) ** 2).mean(0)
    k = WINDOW // PERIOD
    places = ((0, k), (k, 0), (k, k), (0, 2 * k), (2 * k, 0))
    return max(_over_surroundings(power, row, column) for row, column in places)


def _over_surroundings(power: np.ndarray, row: int, column: int) -> float:
    offsets = [(i, j) for i in range(-FAR, FAR + 1) for j in range(-FAR, FAR + 1) if max(abs(i), abs(j)) >= NEAR]
    around = [power[(row + i) % WINDOW, (column + j) % WINDOW] for i, j in offsets]
    return float(power[row, column] / max(float(np.median(around)), FLAT))


def _luma(pixels: np.ndarray) -> np.ndarray:
    return luma(to_tensor(pixels))[0, 0].numpy() * BYTE_MAX


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line: a line for each picture."""
    for path in map(Path, sys.argv[1:] if arguments is None else arguments):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        print(f"lattice {lattice(pixels):.3f}  comb {comb(pixels):6.2f}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
