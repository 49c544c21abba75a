"""Ways to enlarge a picture four times, and the processor time that they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.testset import SCALE
from training.images import to_picture, to_tensor
from training.networks.inference import Restorer


@dataclass(frozen=True)
class Result:
    """An enlarged picture."""

    pixels: np.ndarray
    """uint8 (4 h, 4 w, 3) RGB."""
    seconds: float
    """CPU time of making it, of all threads, without loading weights: unlike wall time, hardly changed by other
    programs; on one thread of an idle machine the two are equal."""


Enlarge = Callable[[np.ndarray], np.ndarray]  # uint8 (h, w, 3) -> uint8 (4 h, 4 w, 3)
Method = Callable[[np.ndarray], Result]


def timed(enlarge: Enlarge) -> Method:
    """Returns `enlarge` with a clock."""

    def method(lq: np.ndarray) -> Result:
        started = time.process_time()
        pixels = enlarge(lq)
        return Result(pixels, time.process_time() - started)

    return method


def pillow_enlarge(resampling: Image.Resampling) -> Enlarge:
    """Returns Pillow's enlargement."""

    def enlarge(lq: np.ndarray) -> np.ndarray:
        image = Image.fromarray(lq)
        return np.asarray(image.resize((SCALE * image.width, SCALE * image.height), resampling))

    return enlarge


def our_enlarge(restorer: Restorer, timestep: int) -> Enlarge:
    """Returns the weights at a timestep, 1..999, with AdaIN and 8-bit rounding as in the node and SaveImage."""

    def enlarge(lq: np.ndarray) -> np.ndarray:
        return np.asarray(to_picture(restorer(to_tensor(lq), timestep, SCALE)))

    return enlarge
