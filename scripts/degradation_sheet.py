"""Shows what the degradation does to photographs.

    python scripts/degradation_sheet.py --data DIR -o FOLDER [--count 64] [--seed 0]

Degrades `count` random crops of 512x512 of the photographs in DIR and writes `degradation-sheet.jpg`, the first 64
low-quality pictures and four of them enlarged beside their originals, and `degradation-histograms.png`: how far the
enlarged pictures are from the originals (PSNR), and how sharp they are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tadsr.geometry import enlarge
from training.data.pictures import DataError, Picture, decode, scan_folder
from training.degradation import degrade
from training.degradation.apply import to_bytes
from training.images import to_tensor
from training.metrics.reference import luma, psnr_y

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend that needs no screen

CROP = 512
SCALE = 4
SHEET_COUNT = 64
SHEET_COLUMNS = 8
PAIRS = 4
PAIR_SIDE = 256
JPEG_QUALITY = 70
SHEET_NAME, HISTOGRAMS_NAME = "degradation-sheet.jpg", "degradation-histograms.png"
BINS = 32


@dataclass(frozen=True)
class Degraded:
    """A crop and what became of it."""

    hq_middle: np.ndarray
    """The middle of the crop, uint8 (256, 256, 3)."""
    lq: np.ndarray
    """uint8 (128, 128, 3)."""
    psnr: float
    """Of the luma of the bicubically enlarged LQ, in dB."""
    sharpness: float
    """Variance of the Laplacian of that luma, divided by that of the HQ's; noise counts as sharpness. NaN for an HQ of
    one colour."""


def degraded_crops(pictures: Sequence[Picture], count: int, seed: int) -> list[Degraded]:
    """Returns `count` degraded crops, the same for a seed; pictures follow each other in a shuffled order."""
    order = np.random.default_rng(seed).permutation(len(pictures))
    return [_degrade_crop(pictures[order[i % len(order)]], np.random.default_rng((seed, i))) for i in range(count)]


def sharpness(image: Tensor) -> float:
    """Returns the variance of the Laplacian of the luma of `image`, (1, 3, H, W) in [0, 1]."""
    return float(ndimage.laplace(luma(image)[0, 0].numpy()).var())


def contact_sheet(crops: Sequence[Degraded]) -> Image.Image:
    """Returns the low-quality pictures in rows, and below them pairs: an LQ picture enlarged, and its original."""
    side = CROP // SCALE
    small = [Image.fromarray(crop.lq) for crop in crops[:SHEET_COUNT]]
    pairs = [_pair(crop) for crop in crops[:: max(1, len(small) // PAIRS)][:PAIRS]]
    width = SHEET_COLUMNS * side
    per_row = width // (2 * PAIR_SIDE)
    rows = -(-len(small) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (width, rows * side + -(-len(pairs) // per_row) * PAIR_SIDE), "white")
    for i, picture in enumerate(small):
        sheet.paste(picture, (i % SHEET_COLUMNS * side, i // SHEET_COLUMNS * side))
    for i, picture in enumerate(pairs):
        sheet.paste(picture, (i % per_row * 2 * PAIR_SIDE, rows * side + i // per_row * PAIR_SIDE))
    return sheet


def measures(crops: Sequence[Degraded]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the PSNR of all crops, and the sharpness of those that have one."""
    ratio = np.array([crop.sharpness for crop in crops])
    return np.array([crop.psnr for crop in crops]), ratio[np.isfinite(ratio)]


def draw_histograms(crops: Sequence[Degraded], path: Path) -> None:
    """Writes the histograms of PSNR and sharpness as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    psnr, ratio = measures(crops)
    left.hist(psnr, bins=BINS)
    left.set(xlabel="PSNR of luma, dB", ylabel="crops", title=f"LQ enlarged to HQ, median {np.median(psnr):.1f} dB")
    right.hist(ratio, bins=np.geomspace(ratio.min() * 0.99, ratio.max() * 1.01, BINS + 1))
    right.set(xscale="log", xlabel="variance of the Laplacian, LQ enlarged / HQ", ylabel="crops")
    right.set_title(f"Sharpness, median {np.median(ratio):.4f}")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def summary(crops: Sequence[Degraded]) -> str:
    """Returns the percentiles of both measures as a Markdown table."""
    marks = (5, 25, 50, 75, 95)
    psnr, ratio = (np.percentile(values, marks) for values in measures(crops))
    lines = [
        f"| percentile of {len(crops)} crops | " + " | ".join(str(mark) for mark in marks) + " |",
        "|---" * (len(marks) + 1) + "|",
        "| PSNR, dB | " + " | ".join(f"{value:.1f}" for value in psnr) + " |",
        "| sharpness, LQ enlarged / HQ | " + " | ".join(f"{value:.4f}" for value in ratio) + " |",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes both pictures and prints the percentiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs, searched recursively")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the two pictures")
    parser.add_argument("--count", type=int, default=SHEET_COUNT, help="crops to degrade; the sheet shows at most 64")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; accepted: integers from 1")
    try:
        pictures = large_pictures(options.data)
    except DataError as error:
        parser.error(str(error))
    crops = degraded_crops(pictures, options.count, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    contact_sheet(crops).save(options.output / SHEET_NAME, quality=JPEG_QUALITY, optimize=True)
    draw_histograms(crops, options.output / HISTOGRAMS_NAME)
    print(summary(crops))


def large_pictures(folder: Path) -> list[Picture]:
    """Returns the photographs that a crop fits into; raises DataError if there are none."""
    found = scan_folder(folder, sidecars=False).pictures
    large = [picture for picture in found if min(picture.size) >= CROP]
    if not large:
        raise DataError(f"{folder} has {len(found)} pictures, all smaller than the crop of {CROP}x{CROP}")
    return large


def _degrade_crop(picture: Picture, rng: np.random.Generator) -> Degraded:
    photograph = decode(picture.hq.read())
    top, left = (int(rng.integers(0, side - CROP, endpoint=True)) for side in photograph.shape[:2])
    hq = np.ascontiguousarray(photograph[top : top + CROP, left : left + CROP])
    lq = degrade(hq.astype(np.float32) / 255, rng)
    true, enlarged = to_tensor(hq), _enlarge(lq)
    true_sharpness = sharpness(true)
    ratio = sharpness(enlarged) / true_sharpness if true_sharpness else math.nan
    return Degraded(_middle(hq), lq, psnr_y(enlarged, true).item(), ratio)


def _enlarge(lq: np.ndarray) -> Tensor:
    return enlarge(to_tensor(lq), (CROP, CROP))


def _middle(image: np.ndarray) -> np.ndarray:
    """Returns the middle 256x256 pixels of a crop: in the sheet they stay pixels."""
    corner = (CROP - PAIR_SIDE) // 2
    return image[corner : corner + PAIR_SIDE, corner : corner + PAIR_SIDE].copy()


def _pair(crop: Degraded) -> Image.Image:
    enlarged = to_bytes(_enlarge(crop.lq)[0].permute(1, 2, 0).numpy())
    pair = Image.new("RGB", (2 * PAIR_SIDE, PAIR_SIDE))
    pair.paste(Image.fromarray(_middle(enlarged)), (0, 0))
    pair.paste(Image.fromarray(crop.hq_middle), (PAIR_SIDE, 0))
    return pair


if __name__ == "__main__":
    main()
