"""The fixed test set: 24 Kodak photographs (512x384) and two low-quality versions of each, four times smaller.

    python -m benchmarks.testset     writes the low-quality images into the cache as PNG, and checks their digests

`bicubic` is Pillow's antialiased bicubic; `realesrgan` is the second-order degradation with a fixed seed per image.
None of these photographs may be used in training or tuning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from host.cache import cache_directory
from training.degradation import FULL, degrade

COUNT = 24
WIDTH, HEIGHT = 512, 384
SCALE = 4
SEED = 20250823
"""Image number n is degraded with the generator of (SEED, n)."""

DIGESTS = {
    "bicubic": "c1a089afe006030866f1a74153ed8ec8fad76504b66042e71f50c886e8c12b38",
    "realesrgan": "1531e14bfb97e374099432d49e70044e1c467a19bc49b70aa2c2a77d6983322a",
}
"""sha256 over the pixels of the 24 low-quality images in order, measured with Pillow 13.0, OpenCV 5.0 and numpy 2.4
on x86-64. Other versions may round single pixels otherwise; then figures are not exactly comparable."""


@dataclass(frozen=True)
class Sample:
    """One photograph and its low-quality version."""

    name: str
    """kodim01..kodim24."""
    hq: np.ndarray
    """uint8 (384, 512, 3) RGB."""
    lq: np.ndarray
    """uint8 (96, 128, 3) RGB."""


def load_photographs(folder: Path | None = None) -> list[np.ndarray]:
    """Returns the 24 photographs' centres, uint8 (384, 512, 3) RGB, from `folder` (default: the cache).

    Raises FileNotFoundError where they have not been fetched, ValueError where one is too small.
    """
    folder = folder or cache_directory() / "photos" / "kodak"
    paths = [folder / f"kodim{number:02d}.png" for number in range(1, COUNT + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {COUNT} test photographs are not in {folder} (first: {missing[0]}); "
            "fetch them with: python scripts/fetch_photos.py --test"
        )
    return [_centre(np.asarray(Image.open(path).convert("RGB")), path) for path in paths]


def degrade_bicubic(hq: np.ndarray, number: int) -> np.ndarray:
    """Returns `hq`, uint8 (H, W, 3), four times smaller by antialiased bicubic interpolation; the same each time."""
    height, width = hq.shape[:2]
    return np.asarray(Image.fromarray(hq).resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC))


def degrade_realesrgan(hq: np.ndarray, number: int) -> np.ndarray:
    """Returns the second-order degradation of `hq`, uint8 (H, W, 3), with the seed of image `number`."""
    return degrade(hq.astype(np.float32) / 255, np.random.default_rng((SEED, number)), FULL)


DEGRADATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "bicubic": degrade_bicubic,
    "realesrgan": degrade_realesrgan,
}


def make_test_set(kind: str, photographs: list[np.ndarray]) -> list[Sample]:
    """Returns the samples of `kind`, bicubic or realesrgan, in order. Raises ValueError for another kind."""
    if kind not in DEGRADATIONS:
        raise ValueError(f"the kind of test set is {kind!r}; accepted: {', '.join(DEGRADATIONS)}")
    return [
        Sample(name=f"kodim{number:02d}", hq=hq, lq=DEGRADATIONS[kind](hq, number))
        for number, hq in enumerate(photographs, start=1)
    ]


def load_test_set(kind: str) -> list[Sample]:
    """Returns the samples of `kind` made from the photographs in the cache; errors as the two functions above."""
    return make_test_set(kind, load_photographs())


def digest(samples: list[Sample]) -> str:
    """Returns the sha256 over the pixels of the low-quality images."""
    return hashlib.sha256(b"".join(sample.lq.tobytes() for sample in samples)).hexdigest()


def write_test_set(samples: list[Sample], folder: Path) -> None:
    """Writes the low-quality images as <name>.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        Image.fromarray(sample.lq).save(folder / f"{sample.name}.png")


def _centre(photograph: np.ndarray, path: Path) -> np.ndarray:
    height, width = photograph.shape[:2]
    if height < HEIGHT or width < WIDTH:
        raise ValueError(f"{path} is {width}x{height}; accepted: at least {WIDTH}x{HEIGHT}")
    top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
    return np.ascontiguousarray(photograph[top : top + HEIGHT, left : left + WIDTH])


def main() -> None:
    """Writes both versions into the cache and says whether they are those of the published figures."""
    photographs = load_photographs()
    for kind, expected in DIGESTS.items():
        samples = make_test_set(kind, photographs)
        folder = cache_directory() / "testset" / kind
        write_test_set(samples, folder)
        found = digest(samples)
        verdict = "as recorded" if found == expected else f"DIFFERS from the recorded {expected}"
        print(f"{folder}: {len(samples)} images, sha256 {found}, {verdict}")


if __name__ == "__main__":
    main()
