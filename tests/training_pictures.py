"""Pictures and training sets for tests of the training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.data import Sample, TrainingSet, open_training_set

CROP = 32


def save_picture(path: Path, height: int = 48, width: int = 56, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(path, quality=95)
    return np.array(Image.open(path))


def open_set(data: Path, cache: Path, **changes: object) -> TrainingSet:
    settings = {
        **{"data_format": "auto", "crop": CROP, "scale": 4, "flip": 0.5, "seed": 3, "prompts": "auto"},
        **{"prompt": "clean", "plain_bicubic_share": 0.1, "light_share": 0.3, "held_out": 2, "cache": cache},
    }
    return open_training_set(data, **{**settings, **changes})


def same(first: Sample, second: Sample) -> bool:
    names = ("index", "name", "prompt")
    images = all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("lq", "hq"))
    return images and all(getattr(first, name) == getattr(second, name) for name in names)
