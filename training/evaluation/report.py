"""What an evaluation found: rows by picture and method, their means, and the files that show them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.evaluation.figures import Point, draw_curve
from training.metrics.registry import METRICS

FIDELITY = "psnr"
REALISM = ("qalign", "musiq", "niqe", "lpips")
"""What the curve shows realism with: the first that was computed. The paper sets Q-Align against PSNR (table 3)."""


@dataclass(frozen=True)
class Row:
    """The scores of one method on one picture."""

    picture: str
    method: str
    timestep: int | None  # None: another method
    scores: dict[str, float]  # by the metric's name


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was found, rows in the order of pictures, then methods."""

    data: str
    weights: str
    border: int
    prompts: str  # in words
    rows: Sequence[Row]
    missing: dict[str, str]  # metrics left out, with the reason

    @property
    def methods(self) -> list[str]:
        """The methods, in their order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def pictures(self) -> list[str]:
        """The pictures, in their order."""
        return list(dict.fromkeys(row.picture for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """The metrics that every row has, in the order of METRICS."""
        return [name for name in METRICS if name not in self.missing and all(name in row.scores for row in self.rows)]

    def timestep(self, method: str) -> int | None:
        """Returns the timestep of a method, or None for another method than ours."""
        return next(row.timestep for row in self.rows if row.method == method)

    def mean(self, method: str, metric: str) -> float:
        """Returns the mean of a metric over the pictures."""
        return float(np.mean([row.scores[metric] for row in self.rows if row.method == method]))


def markdown(evaluation: Evaluation) -> str:
    """Returns the means as a Markdown table, then what was left out and why."""
    metrics = [METRICS[name] for name in evaluation.metrics]
    header = [f"{metric.label} {'↑' if metric.higher_is_better else '↓'}" for metric in metrics]
    lines = [
        f"{evaluation.data}: mean of {len(evaluation.pictures)} pictures; weights {evaluation.weights}; "
        f"prompts: {evaluation.prompts}; border {evaluation.border}",
        "",
        f"| {' | '.join(['method', *header])} |",
        f"|{'---|' * (len(header) + 1)}",
    ]
    for method in evaluation.methods:
        means = [f"{evaluation.mean(method, metric.name):.{metric.digits}f}" for metric in metrics]
        lines.append(f"| {' | '.join([method, *means])} |")
    if evaluation.missing:
        lines += ["", "Left out:", ""]
        lines += [f"- {METRICS[name].label}: {reason}" for name, reason in sorted(evaluation.missing.items())]
    return "\n".join(lines)


def csv_text(evaluation: Evaluation) -> str:
    """Returns one line for each picture and method: picture, method, timestep, metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "method", "timestep", *evaluation.metrics])
    for row in evaluation.rows:
        timestep = "" if row.timestep is None else row.timestep
        writer.writerow([row.picture, row.method, timestep, *(row.scores[name] for name in evaluation.metrics)])
    return text.getvalue()


def json_text(evaluation: Evaluation) -> str:
    """Returns the means by method, and what they were computed from; what is not finite is a text."""
    means = {
        method: {name: _json_number(evaluation.mean(method, name)) for name in evaluation.metrics}
        for method in evaluation.methods
    }
    content = {
        "data": evaluation.data,
        "weights": evaluation.weights,
        "border": evaluation.border,
        "prompts": evaluation.prompts,
        "pictures": len(evaluation.pictures),
        "timesteps": {method: evaluation.timestep(method) for method in evaluation.methods},
        "means": means,
        "missing": evaluation.missing,
    }
    return json.dumps(content, indent=2) + "\n"


def write_report(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Writes results.md, results.csv, results.json, and curve.png where fidelity and realism were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.md": markdown(evaluation) + "\n",
        "results.csv": csv_text(evaluation),
        "results.json": json_text(evaluation),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    written = [folder / name for name in texts]
    realism = next((name for name in REALISM if name in evaluation.metrics), None)
    if FIDELITY in evaluation.metrics and realism:
        points = [
            Point(
                method, evaluation.timestep(method), evaluation.mean(method, FIDELITY), evaluation.mean(method, realism)
            )
            for method in evaluation.methods
        ]
        metric = METRICS[realism]
        draw_curve(folder / "curve.png", points, METRICS[FIDELITY].label, metric.label, metric.higher_is_better)
        written.append(folder / "curve.png")
    return written


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
