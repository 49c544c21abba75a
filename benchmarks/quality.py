"""Measures the bundled model and its peers on the 24 Kodak test crops: `python -m benchmarks.quality`.

For each test set (bicubic: x4 downscaled; realesrgan: degraded with a fixed seed) it prints a table of PSNR-Y, SSIM,
LPIPS, DISTS, NIQE, BRISQUE and CPU seconds, how the metrics follow the timestep, and the colour error; it writes a
contact sheet for each photograph. `--weights label=FILE` measures another self-contained file, and may be repeated.

While tuning a training, measure on the crops that it leaves out instead: `--held-out CROPS.npy`.

The peers' packages are installed into the cache on the first run (`benchmarks.packages`), and their pictures are kept
there with the seconds that they took: `--fresh` makes them anew. What cannot be had is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.methods import Method, our_enlarge, pillow_enlarge, timed
from benchmarks.packages import reason
from benchmarks.peers import PEERS, peer_method
from benchmarks.quality_report import COLOUR, COLUMNS, SECONDS, Results, colour_table, dial_table, table, write_sheet
from benchmarks.testset import DEGRADATIONS, SCALE, Sample, load_test_set, make_test_set
from host.cache import cache_directory
from host.errors import HostError
from tadsr.geometry import enlarge, target_size
from training.evaluate import TIMESTEPS, positive, timesteps_in
from training.images import BYTE_MAX, to_tensor
from training.metrics.registry import Metrics
from training.networks.inference import Restorer

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tadsr-mini.safetensors"
BORDER = 4  # pixels left out of PSNR and SSIM at each side: the scale, as is usual
PHOTOGRAPH = "photograph"
PILLOW = {
    "lanczos": ("Lanczos", Image.Resampling.LANCZOS),
    "bicubic": ("bicubic", Image.Resampling.BICUBIC),
}
OURS = "tadsr"
METHODS = (*PILLOW, *PEERS, OURS)


@dataclass
class Lineup:
    """What is measured, and what was left out."""

    methods: dict[str, Method] = field(default_factory=dict)
    """By label, in the order of the tables."""
    dials: dict[str, dict[int, str]] = field(default_factory=dict)
    """The label of each timestep, by model."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a peer cannot be had."""


def colour_error(pixels: np.ndarray, lq: np.ndarray) -> float:
    """Returns how far the mean of the worst channel is from that of the enlarged input, in 1/255.

    pixels: uint8 (4 h, 4 w, 3); lq: uint8 (h, w, 3).
    """
    enlarged = enlarge(to_tensor(lq), target_size(*lq.shape[:2], scale=SCALE))
    difference = (to_tensor(pixels).double() - enlarged.double()).mean(dim=(0, 2, 3))
    return difference.abs().max().item() * BYTE_MAX


def line_up(
    names: Sequence[str], weights: dict[str, Path], timesteps: Sequence[int], threads: int, fresh: bool
) -> Lineup:
    """Returns the methods of `names` (of METHODS): the weights, by label, at each timestep.

    Raises WeightsError for a file that is not self-contained.
    """
    lineup = Lineup()
    for name in names:
        if name in PILLOW:
            label, resampling = PILLOW[name]
            lineup.methods[label] = timed(pillow_enlarge(resampling))
        elif name in PEERS:
            try:
                lineup.methods[PEERS[name].label] = peer_method(PEERS[name], threads, fresh)
            except (HostError, ImportError) as error:
                lineup.missing[PEERS[name].label] = reason(error)
        else:
            for model, path in weights.items():
                restorer = Restorer.load(path)
                lineup.dials[model] = {t: f"{model} t={t}" for t in timesteps}
                lineup.methods |= {label: timed(our_enlarge(restorer, t)) for t, label in lineup.dials[model].items()}
    return lineup


def measure(
    methods: dict[str, Method], samples: Sequence[Sample], metrics: Metrics, sheets: Path | None = None
) -> Results:
    """Returns what each method scores on each sample, and the photographs; writes a sheet of each into `sheets`."""
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*methods, PHOTOGRAPH)}
    for sample in tqdm(samples, disable=None):
        score, alone = metrics.scorer(to_tensor(sample.hq)), metrics.scorer(None)
        pictures = {}
        for name, method in methods.items():
            result = method(sample.lq)
            besides = {SECONDS: result.seconds, COLOUR: colour_error(result.pixels, sample.lq)}
            results[name][sample.name] = score(to_tensor(result.pixels)) | besides
            pictures[name] = result.pixels
        results[PHOTOGRAPH][sample.name] = alone(to_tensor(sample.hq))
        if sheets is not None:
            shown = [(name, Image.fromarray(p)) for name, p in {**pictures, PHOTOGRAPH: sample.hq}.items()]
            write_sheet(sheets / f"{sample.name}.png", shown)
    return results


def held_out_samples(crops_path: Path, kind: str, count: int) -> list[Sample]:
    """Returns `count` of the crops that training leaves out, degraded by `kind` of the test sets.

    crops_path: the .npy of `scripts/fetch_photos.py`, whose .json beside it says how many there are. Raises OSError
    where one of them is missing.
    """
    held_out = json.loads(crops_path.with_suffix(".json").read_text(encoding="utf-8"))["validation"]
    crops = np.load(crops_path, mmap_mode="r")[-held_out:]
    chosen = [np.array(crop) for crop in crops[:: max(1, len(crops) // count)][:count]]
    return [replace(s, name=f"held-out{i:02d}") for i, s in enumerate(make_test_set(kind, chosen), start=1)]


def report(results: Results, lineup: Lineup) -> str:
    """Returns the tables of one test set."""
    parts = [table(results)]
    if dial := dial_table(results, lineup.dials):
        parts.append("Rank correlation with the timestep: of the means (mean over the photographs)\n\n" + dial)
    parts.append(colour_table(results))
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints what the command line asks for."""
    torch.set_num_threads(arguments.threads)
    weights = dict(arguments.weights or [named_weights(str(WEIGHTS))])
    lineup = line_up(arguments.methods, weights, arguments.timesteps, arguments.threads, arguments.fresh)
    metrics = Metrics(arguments.metrics, border=BORDER, table=COLUMNS)
    for name, why in {**lineup.missing, **{COLUMNS[name].label: why for name, why in metrics.missing.items()}}.items():
        print(f"left out: {name}: {why}")
    found = {}
    for kind in arguments.kinds:
        if arguments.held_out:
            samples = held_out_samples(arguments.held_out, kind, arguments.limit)
        else:
            samples = load_test_set(kind)[: arguments.limit]
        found[kind] = measure(lineup.methods, samples, metrics, arguments.sheets / kind)
        print(f"\n{kind}, mean of {len(samples)}:\n\n{report(found[kind], lineup)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"\nsheets: {arguments.sheets}")


def named_weights(text: str) -> tuple[str, Path]:
    """Returns label and path of `label=FILE`, or of a path alone, whose label is the file's stem."""
    label, separator, file = text.partition("=")
    if separator and not Path(text).is_file():
        return label, Path(file)
    return Path(text).stem, Path(text)


def one_of(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns a type for argparse: a list of the accepted names, separated by commas."""

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in accepted]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; accepted: {', '.join(accepted)}")
        return text.split(",")

    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=named_weights, action="append", metavar="[LABEL=]FILE", help="default: the bundled model")
    add("--held-out", type=Path, metavar="CROPS", help="measure on crops that training left out")
    add("--methods", type=one_of(METHODS), default=METHODS, help=f"of {','.join(METHODS)}")
    add("--metrics", type=one_of(tuple(COLUMNS)), default=tuple(COLUMNS), help=f"of {','.join(COLUMNS)}")
    add("--timesteps", type=timesteps_in, default=TIMESTEPS, help="default: 100,200,...,900")
    add("--kinds", type=one_of(tuple(DEGRADATIONS)), default=tuple(DEGRADATIONS), help=f"of {','.join(DEGRADATIONS)}")
    add("--limit", type=positive, default=24, help="only the first photographs of each set")
    add("--threads", type=positive, default=1, help="CPU threads of all networks (default: 1)")
    add("--fresh", action="store_true", help="make the peers' pictures anew")
    add("--sheets", type=Path, default=cache_directory() / "quality", help="folder of the sheets")
    add("--json", type=Path, metavar="FILE", help="write each photograph's values")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        run(_parser().parse_args(argv))
    except (ValueError, OSError) as error:  # WeightsError, files that are not there
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
