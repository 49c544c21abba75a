"""Prepares what tadsr-mini learns from: `python scripts/mini_samples.py -o DIR`.

Photographs, degraded, and what open upscalers make of them: see `training.mini.samples`. A stopped run goes on where it
was, and a training may read the folder meanwhile. The upscalers take milliseconds a picture on a GPU, seconds on a
processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.packages import install
from benchmarks.peers import PEERS, Peer, load_network, model_stem
from benchmarks.rrdb import load_rrdb
from host.cache import cache_directory
from training.mini.patches import fit_patches
from training.mini.samples import PATCHES, SEED, Kind, open_arrays, write_samples

COMPONENT_CROPS = 600
TEACHERS = {Kind.PLAIN: "realsr", Kind.LIGHT: "realesrgan", Kind.FULL: "realesrgan"}


def write_part(folder: Path, crops: Path, validation: int, part: int, parts: int) -> None:
    """Writes every `parts`-th photograph and its degraded version, from `part` on, as far as they are not there."""
    torch.set_num_threads(1)
    arrays = open_arrays(folder, writable=True)
    write_samples(arrays, np.load(crops, mmap_mode="r")[:-validation], range(part, len(arrays["made"]), parts))


def load_teacher(peer: Peer, folder: Path | None, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what enlarges a batch of uint8 pictures; folder: where its files are, otherwise its package's."""
    stem = folder / peer.model if folder else model_stem(peer, install(peer.package))
    if device.type != "cpu":
        return load_rrdb(stem, device)
    network = load_network(stem, threads=1)
    return lambda batch: np.stack([network(picture) for picture in batch])


def write_teachers(arrays: dict[str, np.ndarray], options: argparse.Namespace) -> None:
    """Writes the teachers' pictures, as far as they are not there."""
    for name in options.teachers:
        kinds = [kind for kind, teacher in TEACHERS.items() if teacher == name]
        missing = np.flatnonzero((arrays["done"] == 0) & np.isin(arrays["kind"], kinds))
        if not len(missing):
            continue
        enlarge = load_teacher(PEERS[name], options.teacher_files, options.device)
        for chosen in np.array_split(missing, -(-len(missing) // options.batch)):
            arrays["teacher"][chosen] = enlarge(arrays["lq"][chosen])
            arrays["done"][chosen] = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder to write into")
    add("--crops", type=Path, default=cache_directory() / "photos" / "crops_256.npy")
    add("--validation", type=int, default=64, help="crops at the end that are kept out")
    add("--count", type=int, default=6000, help="samples")
    add("--workers", type=int, default=1, help="processes that degrade")
    teachers = sorted(set(TEACHERS.values()))
    add("--teachers", nargs="*", default=teachers, choices=teachers, help="whose pictures are made; nothing: none")
    add("--teacher-files", type=Path, help="folder with their .param and .bin files; otherwise they are installed")
    add("--device", type=torch.device, default=torch.device("cpu"), help="of the teachers")
    add("--batch", type=int, default=1, help="pictures that a teacher enlarges at once")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    crops = np.load(options.crops, mmap_mode="r")[: -options.validation]
    if not (options.output / PATCHES).is_file():
        chosen = np.random.default_rng(SEED).permutation(len(crops))[:COMPONENT_CROPS]
        fit_patches(crops[np.sort(chosen)]).save(options.output / PATCHES)
    arrays = open_arrays(options.output, options.count, writable=True)
    parts = options.workers
    with ProcessPoolExecutor(parts) as pool:
        common = (options.output, options.crops, options.validation)
        for job in [pool.submit(write_part, *common, part, parts) for part in range(parts)]:
            job.result()
    write_teachers(arrays, options)


if __name__ == "__main__":
    main()
