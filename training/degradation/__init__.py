"""Degradation of photographs into low-quality inputs: the second-order model of Real-ESRGAN.

rng = numpy.random.default_rng(seed)
lq = degrade(hq, rng)                                    # the full model
lq = degrade(hq, rng, LIGHT)                             # mild: nearly clean inputs
parameters = draw_parameters(rng); lq = apply(hq, parameters, rng)
lq = degrade_batch(hq, parameters, seeds)                # the same on tensors, for a GPU
"""

from __future__ import annotations

import cv2

from .apply import apply, degrade
from .batched import degrade_batch
from .config import (
    FULL,
    LIGHT,
    BlurConfig,
    DegradationConfig,
    NoiseConfig,
    ResizeConfig,
    SincConfig,
    StageConfig,
)
from .parameters import DegradationParameters, draw_parameters

# Small crops gain nothing from OpenCV's threads, workers are the parallelism, and its threads hang a forked worker.
cv2.setNumThreads(1)

__all__ = [
    "FULL",
    "LIGHT",
    "BlurConfig",
    "DegradationConfig",
    "DegradationParameters",
    "NoiseConfig",
    "ResizeConfig",
    "SincConfig",
    "StageConfig",
    "apply",
    "degrade",
    "degrade_batch",
    "draw_parameters",
]
