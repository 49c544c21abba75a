"""Makes ``assets/sample.jpg`` and ``assets/sample_hq.webp``: a low-quality input and its ground truth.

    python scripts/make_sample.py

The photograph is one that training leaves out (``SAMPLE_PHOTOGRAPH``). It is scaled down to 960x640, which is the
ground truth; the input is that blurred, scaled down by four, with a little sensor noise, saved as a strong JPEG:
what a picture looks like that was sent around as a thumbnail.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.cache import cache_directory
from scripts.photo_packages import fetch_package
from scripts.photo_pictures import to_rgb
from scripts.photo_sources import SAMPLE_PHOTOGRAPH, TRAINING_SOURCES

ASSETS = Path(__file__).resolve().parents[1] / "assets"
GROUND_TRUTH_SIZE = (960, 640)
SCALE = 4
BLUR_SIGMA = 2.0
"""In pixels of the ground truth: half a pixel of the input."""
NOISE_SIGMA = 2.0
JPEG_QUALITY = 60
WEBP_QUALITY = 90
SEED = 7


def ground_truth(photograph: Image.Image) -> Image.Image:
    """Returns the photograph scaled down to cover 960x640, its middle cut out."""
    width, height = GROUND_TRUTH_SIZE
    factor = max(width / photograph.width, height / photograph.height)
    size = (round(photograph.width * factor), round(photograph.height * factor))
    scaled = photograph.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def low_quality(truth: Image.Image) -> Image.Image:
    """Returns the truth blurred, scaled down by four and with noise (the JPEG artefacts come on saving)."""
    blurred = truth.filter(ImageFilter.GaussianBlur(BLUR_SIGMA))
    small = blurred.resize((truth.width // SCALE, truth.height // SCALE), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float32)
    noisy = pixels + np.random.default_rng(SEED).normal(0, NOISE_SIGMA, pixels.shape)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def main() -> None:
    """Fetches the package with the photograph and writes both files."""
    source = next(source for source in TRAINING_SOURCES if source.name == "lomiri-wallpapers-16.04")
    files = fetch_package(source, cache_directory() / "photos" / "packages")
    with Image.open(next(files.rglob(SAMPLE_PHOTOGRAPH))) as opened:
        truth = ground_truth(to_rgb(opened))
    ASSETS.mkdir(exist_ok=True)
    truth.save(ASSETS / "sample_hq.webp", quality=WEBP_QUALITY, method=6)
    low_quality(truth).save(ASSETS / "sample.jpg", quality=JPEG_QUALITY)


if __name__ == "__main__":
    main()
