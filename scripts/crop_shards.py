"""Packs the crops that scripts/fetch_photos.py made into tar shards of WebP pictures, to train on or to send elsewhere.

python scripts/crop_shards.py -o SHARDS                # 95 MB or so
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.cache import cache_directory


def write_shards(crops: np.ndarray, folder: Path, per_shard: int, quality: int) -> list[Path]:
    """Writes crops, uint8 (N, side, side, 3), in order as shard-0000.tar and so on; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, len(crops), per_shard):
        path = folder / f"shard-{first // per_shard:04d}.tar"
        with tarfile.open(path, "w") as shard:
            for number, crop in enumerate(crops[first : first + per_shard], start=first):
                picture = io.BytesIO()
                Image.fromarray(crop).save(picture, "WEBP", quality=quality, method=2)
                member = tarfile.TarInfo(f"{number:06d}.webp")
                member.size = picture.tell()
                picture.seek(0)
                shard.addfile(member, picture)
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=Path, default=cache_directory() / "photos" / "crops_256.npy")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--quality", type=int, default=95, help="of WebP, 1..100")
    options = parser.parse_args()
    for path in write_shards(np.load(options.crops, mmap_mode="r"), options.output, options.per_shard, options.quality):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
