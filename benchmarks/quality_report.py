"""What `benchmarks.quality` shows: tables, the dial's monotony, and contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from benchmarks.no_reference import NO_REFERENCE
from host.sheet import before_after_sheet, richest_detail
from training.metrics.registry import METRICS

Scores = Mapping[str, float]  # by metric
Results = Mapping[str, Mapping[str, Scores]]  # by method, then by picture

COLUMNS = {name: METRICS[name] for name in ("psnr", "ssim", "lpips", "dists")} | NO_REFERENCE
"""The metrics of the table, in its order; of `lattice` and `comb` (`benchmarks.lattice`) it shows the medians."""

MEDIANS = ("lattice", "comb")

SECONDS, COLOUR = "cpu_seconds", "colour_error"
"""Measured besides the metrics; a photograph has neither."""

DIAL_METRICS = ("psnr", "lpips", "niqe")
FEWEST_TIMESTEPS = 3  # two always correlate fully
SHEET_COLUMNS = 6


def means(results: Results) -> dict[str, dict[str, float]]:
    """Returns each method's mean (MEDIANS: median) over the pictures of what was measured."""
    return {
        method: {
            name: float((np.median if name in MEDIANS else np.mean)([scores[name] for scores in pictures.values()]))
            for name in first(pictures)
        }
        for method, pictures in results.items()
    }


def first(pictures: Mapping[str, Scores]) -> Scores:
    """Returns the scores of the first picture."""
    return next(iter(pictures.values()))


def table(results: Results) -> str:
    """Returns the means as a Markdown table; a dash where a method was not measured."""
    found = means(results)
    columns = [metric for name, metric in COLUMNS.items() if any(name in scores for scores in found.values())]
    lines = [_row(["method", *(metric.label for metric in columns), "CPU seconds"]), _row(["---"] * (len(columns) + 2))]
    for method, scores in found.items():
        cells = [_cell(scores, metric.name, metric.digits) for metric in columns]
        lines.append(_row([method, *cells, _cell(scores, SECONDS, 2)]))
    return "\n".join(lines)


def dial_table(results: Results, dials: Mapping[str, Mapping[int, str]]) -> str:
    """Returns Spearman's correlation of the timestep with metrics; "" without `FEWEST_TIMESTEPS` timesteps.

    dials: the method of each timestep, by model. Each cell: that of the means over the pictures, then the mean over
    the pictures of each one's own.
    """
    dials = {model: dial for model, dial in dials.items() if len(dial) >= FEWEST_TIMESTEPS}
    measured = [name for name in DIAL_METRICS if dials and name in first(results[next(iter(results))])]
    if not measured:
        return ""
    found = means(results)
    lines = [_row(["model", *(COLUMNS[name].label for name in measured)]), _row(["---"] * (len(measured) + 1))]
    for model, dial in dials.items():
        cells = []
        for name in measured:
            of_means = correlation(dial, [found[method][name] for method in dial.values()])
            pictures = results[next(iter(dial.values()))]
            own = [correlation(dial, [results[method][p][name] for method in dial.values()]) for p in pictures]
            cells.append(f"{of_means:+.2f} ({np.mean(own):+.2f})")
        lines.append(_row([model, *cells]))
    return "\n".join(lines)


def correlation(timesteps: Sequence[int] | Mapping[int, str], values: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, -1..1, of values with their timesteps; NaN where all are equal."""
    if len(set(values)) == 1:
        return float("nan")
    found: Any = spearmanr(list(timesteps), values)  # scipy's own types do not say what is in it
    return float(found.statistic)


def colour_table(results: Results) -> str:
    """Returns the methods' mean colour error as a Markdown table."""
    lines = ["| method | colour error (of 255) |", "| --- | --- |"]
    lines += [_row([m, f"{scores[COLOUR]:.3f}"]) for m, scores in means(results).items() if COLOUR in scores]
    return "\n".join(lines)


def write_sheet(path: Path, pictures: Sequence[tuple[str, Image.Image]]) -> None:
    """Writes (label, picture) in rows of `SHEET_COLUMNS`, each with the detail that is richest in the last."""
    box = richest_detail(pictures[-1][1])
    starts = range(0, len(pictures), SHEET_COLUMNS)
    rows = [before_after_sheet(pictures[start : start + SHEET_COLUMNS], box) for start in starts]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), rows[0].getpixel((0, 0)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _cell(scores: Scores, name: str, digits: int) -> str:
    return f"{scores[name]:.{digits}f}" if name in scores else "-"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
