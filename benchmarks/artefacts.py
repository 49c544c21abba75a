"""Looks for artefacts of a weights file: `python -m benchmarks.artefacts [--weights FILE]`.

Sizes: pictures from 1x1 to 256x256 must come out finite and exactly four times larger. Grids: upsampling layers can
leave a pattern that repeats every 2, 4 or 8 pixels; in the Fourier spectrum its energy lies at exact bins, which are
compared with the frequencies around them, on a smooth sky and on the Kodak test crops, and with the same ratio of the
photograph. Lattice: what the eye takes for a weave is not one frequency but detail that is stronger at some pixels of
each 4x4 than at others; `benchmarks.lattice` measures it. Prints tables and writes the sky, its difference from the
truth and its spectrum as PNG. The exit status is 1 where something was found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.lattice import MOST_COMB, MOST_LATTICE, comb, lattice
from benchmarks.quality import WEIGHTS, one_of
from benchmarks.testset import COUNT, DEGRADATIONS, HEIGHT, SCALE, WIDTH, load_test_set
from host.cache import cache_directory
from host.sheet import before_after_sheet
from tadsr.schedule import MAX_TIMESTEP, MIN_TIMESTEP
from training.evaluate import positive, timesteps_in
from training.images import BYTE_MAX, to_picture, to_tensor
from training.metrics.reference import luma
from training.networks.inference import Restorer

SIZES = ((1, 1), (1, 7), (7, 1), (33, 65), (64, 64), (128, 96), (256, 256))  # height, width of the input
SIZE_TIMESTEPS = (MIN_TIMESTEP, 500, MAX_TIMESTEP)

PERIODS = (2, 4, 8)  # pixels: one to three halvings, as a VAE of four or eight times reduction has
DIRECTIONS = ("rows", "columns", "both")
NEIGHBOURS = range(3, 9)  # bins beside a grid's: the window spreads a grid over one bin at each side
ROUNDING_VARIANCE = 1 / 12  # of rounding to 8 bits, in squares of 1/255: weaker patterns than its noise are not seen

MOST_RATIO = 3.0  # times the photograph's ratio, or times 1, which is no grid, if that is more
LEAST_AMPLITUDE = 0.25  # of 255; half the largest error of rounding to 8 bits. Both must be passed
# Measured on the first tadsr-mini, 8 bicubic pictures, period 4: at timestep 900, where fine lines are seen, amplitude
# 1.3 and 63 times the photograph's ratio; at timestep 100, where none are seen, amplitude 0.13.

SKY_TOP, SKY_BOTTOM = (0.36, 0.56, 0.86), (0.80, 0.88, 0.95)  # RGB
SKY_GLOW = 0.04  # from left to right
CONTRAST = 32  # of the difference that is shown


@dataclass(frozen=True)
class Finding:
    """How strong a pattern of one period is, in the direction where it exceeds the photograph most."""

    period: int
    """In pixels."""
    direction: str
    ratio: float
    """Energy at the bin over that of its neighbours: about 1 without a pattern."""
    expected: float
    """The same in the photograph."""
    amplitude: float
    """Of the pattern's luma, in 1/255."""

    @property
    def is_grid(self) -> bool:
        """Whether it stands out of its neighbours, more than in the photograph, and is strong enough to be seen."""
        return self.ratio > MOST_RATIO * max(1.0, self.expected) and self.amplitude > LEAST_AMPLITUDE


def size_faults(restorer: Restorer, sizes: Sequence[tuple[int, int]] = SIZES) -> Iterator[str]:
    """Yields what is wrong with the results of noise of these sizes, (height, width)."""
    for height, width in sizes:
        noise = np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for timestep in SIZE_TIMESTEPS:
            result = restorer(to_tensor(noise), timestep, SCALE)
            if result.shape != (1, 3, SCALE * height, SCALE * width):
                yield f"{width}x{height} at timestep {timestep} became {tuple(result.shape)}"
            elif not result.isfinite().all():
                yield f"{width}x{height} at timestep {timestep} has numbers that are not finite"


def sky(height: int, width: int) -> Tensor:
    """Returns a smooth sky, (1, 3, height, width) in [0, 1], not rounded to 8 bits; any size shows the same."""
    down = ((torch.arange(height) + 0.5) / height).view(1, 1, height, 1)
    across = ((torch.arange(width) + 0.5) / width).view(1, 1, 1, width)
    top, bottom = (torch.tensor(colour).view(1, 3, 1, 1) for colour in (SKY_TOP, SKY_BOTTOM))
    return top + (bottom - top) * down + SKY_GLOW * across


def spectrum(image: Tensor) -> np.ndarray:
    """Returns the power of luma, (H, W), in squares of 1/255 under a Hann window of sum 1. image: (1, 3, H, W).

    A sine of amplitude a has a power of a**2 / 4 at its bin (a**2 at half the sampling rate).
    """
    values = luma(image)[0, 0].numpy() * BYTE_MAX
    window = np.outer(*(np.hanning(side + 1)[:-1] for side in values.shape))
    window /= window.sum()
    return np.abs(np.fft.fft2((values - (window * values).sum()) * window)) ** 2


def grid_strengths(power: np.ndarray) -> np.ndarray:
    """Returns (PERIODS, DIRECTIONS, 2): ratio to the neighbours' geometric mean, and amplitude, of a `spectrum`.

    Raises ValueError where the sides are no multiples of the longest period.
    """
    height, width = power.shape
    if height % max(PERIODS) or width % max(PERIODS):
        raise ValueError(f"the picture is {width}x{height}; accepted: sides that are multiples of {max(PERIODS)}")
    floor = ROUNDING_VARIANCE * _noise_gain(height) * _noise_gain(width)
    strengths = np.empty((len(PERIODS), len(DIRECTIONS), 2))
    offsets = np.array([sign * n for n in NEIGHBOURS for sign in (-1, 1)])
    for i, period in enumerate(PERIODS):
        for j, (down, across) in enumerate(((1, 0), (0, 1), (1, 1))):
            row, column = down * height // period, across * width // period
            lines = power[(row + offsets) % height, column], power[row, (column + offsets) % width]
            logarithms = [np.log(line + floor).mean() for line in lines]
            beside = np.exp(np.average(logarithms, weights=[down, across]))  # along the pattern's frequency
            peak = power[row, column]
            doubled = 1 if period == 2 else 2  # a real picture has the other half at the mirrored bin
            strengths[i, j] = (peak + floor) / beside, doubled * peak**0.5
    return strengths


def compare(results: Sequence[Tensor], truths: Sequence[Tensor]) -> list[Finding]:
    """Returns one finding for each period: geometric means of the ratios and means of the amplitudes.

    One photograph may pass the limits by chance; a dozen hardly do.
    """
    found, expected = (np.stack([grid_strengths(spectrum(image)) for image in images]) for images in (results, truths))
    ratios, references = (np.exp(np.log(each[..., 0]).mean(axis=0)) for each in (found, expected))
    amplitudes = found[..., 1].mean(axis=0)
    worst = np.argmax(ratios / references, axis=1)
    return [
        Finding(period, DIRECTIONS[j], ratios[i, j], references[i, j], amplitudes[i, j])
        for i, (period, j) in enumerate(zip(PERIODS, worst, strict=True))
    ]


def write_sky(path: Path, result: Tensor, truth: Tensor) -> None:
    """Writes the sky, its difference from the truth with more contrast, and its spectrum, logarithmic."""
    power = np.log10(np.fft.fftshift(spectrum(result)) + 1e-12)
    scaled = (power - power.min()) / max(np.ptp(power), 1e-12)
    shown = {
        "sky": result,
        f"difference from the truth, x{CONTRAST}": (0.5 + CONTRAST * (result - truth)).clamp(0, 1),
        "spectrum, logarithmic": torch.from_numpy(scaled).float().expand(1, 3, -1, -1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    before_after_sheet([(label, to_picture(image)) for label, image in shown.items()]).save(path)


def rows_of(name: str, timestep: int, findings: Sequence[Finding]) -> list[str]:
    """Returns the lines of the Markdown table."""
    return [
        f"| {name} | {timestep} | {f.period} | {f.direction} | {f.ratio:.2f} | {f.expected:.2f} | {f.amplitude:.3f} | "
        f"{'GRID' if f.is_grid else 'none'} |"
        for f in findings
    ]


def lattice_row(name: str, timestep: int, results: Sequence[Tensor], truths: Sequence[Tensor]) -> tuple[str, bool]:
    """Returns a line of the lattice's table, and whether the median of the results has one that can be seen."""
    measured = [
        [function(np.asarray(to_picture(image))) for image in images]
        for images in (results, truths)
        for function in (lattice, comb)
    ]
    middle, worst = [float(np.median(values)) for values in measured], [max(values) for values in measured]
    seen = middle[0] > MOST_LATTICE or middle[1] > max(MOST_COMB, middle[3])
    cells = [f"{m:.3f} / {w:.3f}" for m, w in zip(middle, worst, strict=True)]
    return f"| {name} | {timestep} | {' | '.join(cells)} | {'LATTICE' if seen else 'none'} |", seen


def check_grids(restorer: Restorer, arguments: argparse.Namespace) -> bool:
    """Prints the table and writes the skies; returns whether there is a grid."""
    print("| pictures | timestep | period | direction | ratio | photograph's | amplitude (of 255) | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    small, truth = sky(HEIGHT // SCALE, WIDTH // SCALE), sky(HEIGHT, WIDTH)
    samples = {kind: load_test_set(kind)[: arguments.limit] for kind in arguments.kinds}
    any_grid = False
    lattices = []
    for timestep in arguments.timesteps:
        result = restorer(small, timestep, SCALE)
        write_sky(arguments.output / f"sky-t{timestep}.png", result, truth)
        findings = {"sky": compare([result], [truth])}
        for kind, pictures in samples.items():
            results = [restorer(to_tensor(sample.lq), timestep, SCALE) for sample in pictures]
            truths = [to_tensor(sample.hq) for sample in pictures]
            findings[kind] = compare(results, truths)
            row, seen = lattice_row(kind, timestep, results, truths)
            lattices.append(row)
            any_grid = any_grid or seen
        for name, found in findings.items():
            print("\n".join(rows_of(name, timestep, found)), flush=True)
            any_grid = any_grid or any(finding.is_grid for finding in found)
    print("\n| pictures, median / worst | timestep | lattice | comb | photograph's lattice | its comb | verdict |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lattices))
    return any_grid


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, default=WEIGHTS, help="default: the bundled model")
    add("--timesteps", type=timesteps_in, default=(100, 500, 900), help="of the grids (default: 100,500,900)")
    add("--kinds", type=one_of(tuple(DEGRADATIONS)), default=tuple(DEGRADATIONS), help=f"of {','.join(DEGRADATIONS)}")
    add("--limit", type=positive, default=COUNT, help="only the first photographs")
    add("--output", type=Path, default=cache_directory() / "artefacts", help="folder of the skies")
    arguments = parser.parse_args(argv)
    try:
        restorer = Restorer.load(arguments.weights)
        faults = list(size_faults(restorer))
        print("\n".join(faults) or f"{len(SIZES)} sizes up to 256x256 at timesteps {SIZE_TIMESTEPS}: exact and finite")
        grids = check_grids(restorer, arguments)
    except (ValueError, OSError) as error:  # WeightsError, files that are not there
        print(f"benchmarks.artefacts: {error}", file=sys.stderr)
        return 1
    print(f"{'GRIDS found' if grids else 'no grids'}; skies: {arguments.output}")
    return 1 if faults or grids else 0


def _noise_gain(side: int) -> float:
    """Returns the power at a bin of white noise of variance 1 along a side, under the window."""
    window = np.hanning(side + 1)[:-1]
    return float((window**2).sum() / window.sum() ** 2)


if __name__ == "__main__":
    sys.exit(main())
