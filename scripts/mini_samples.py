"""Prepares what tadsr-mini learns from: `python scripts/mini_samples.py -o DIR`.

Photographs, degraded, and what open upscalers make of them: see `training.mini.samples`. The upscalers take seconds a
picture; a stopped run goes on where it was, and a training may read the folder meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.methods import Enlarge
from benchmarks.packages import install
from benchmarks.peers import PEERS, load_network, model_stem
from host.cache import cache_directory
from training.mini.patches import fit_patches
from training.mini.samples import PATCHES, SEED, Kind, open_arrays, write_samples

COMPONENT_CROPS = 600
TEACHERS = {Kind.PLAIN: "realsr", Kind.LIGHT: "realesrgan", Kind.FULL: "realesrgan"}


def write_teachers(arrays: dict[str, np.ndarray]) -> None:
    """Writes the teachers' pictures, as far as they are not there."""
    networks: dict[str, Enlarge] = {}
    for index in range(len(arrays["done"])):
        if arrays["done"][index]:
            continue
        name = TEACHERS[Kind(arrays["kind"][index])]
        if name not in networks:
            networks[name] = load_network(model_stem(PEERS[name], install(PEERS[name].package)), threads=1)
        arrays["teacher"][index] = networks[name](np.array(arrays["lq"][index]))
        arrays["done"][index] = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--crops", type=Path, default=cache_directory() / "photos" / "crops_256.npy")
    parser.add_argument("--validation", type=int, default=64, help="crops at the end that are kept out")
    parser.add_argument("--count", type=int, default=6000, help="samples")
    options = parser.parse_args()
    crops = np.load(options.crops, mmap_mode="r")[: -options.validation]
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.output / PATCHES).is_file():
        chosen = np.random.default_rng(SEED).permutation(len(crops))[:COMPONENT_CROPS]
        fit_patches(crops[np.sort(chosen)]).save(options.output / PATCHES)
    arrays = open_arrays(options.output, options.count)
    write_samples(arrays, crops)
    write_teachers(arrays)


if __name__ == "__main__":
    main()
