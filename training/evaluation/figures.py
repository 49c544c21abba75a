"""Draws the figures of evaluations and analyses: numbers in, a PNG file out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it keeps figures and picks a display

DOTS_PER_INCH = 150
COLOURS = "viridis"  # of timesteps, from low to high
OURS = "C0"  # of matplotlib's colour cycle; other methods take the next ones


@dataclass(frozen=True)
class Point:
    """A method on the curve of fidelity against realism."""

    label: str
    timestep: int | None  # None: another method, which is not on the line
    fidelity: float
    realism: float


def draw_curve(
    path: Path, points: Sequence[Point], fidelity: str, realism: str, higher_is_realer: bool, title: str = ""
) -> None:
    """Draws fidelity against realism over the timesteps, and other methods beside it (figure 6 of the paper).

    fidelity, realism: the axes' labels. Up and right are better on both axes.
    """
    figure, (axes,) = _figure(1, 6.4, 4.8)
    ours = sorted((point for point in points if point.timestep is not None), key=lambda point: point.timestep or 0)
    axes.plot([p.fidelity for p in ours], [p.realism for p in ours], "-o", color=OURS, label="by timestep")
    for point in ours:
        axes.annotate(f"t={point.timestep}", (point.fidelity, point.realism), (5, 5), textcoords="offset points")
    others = [point for point in points if point.timestep is None]
    for number, point in enumerate(others, start=1):
        axes.plot([point.fidelity], [point.realism], "s", color=f"C{number}", label=point.label)
    axes.set_xlabel(f"{fidelity} (fidelity: right is better)")
    axes.set_ylabel(f"{realism} (realism: up is better)")
    if not higher_is_realer:
        axes.invert_yaxis()
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title)
    _save(figure, path)


def draw_statistics(
    path: Path, timesteps: Sequence[int], mean: np.ndarray, deviation: np.ndarray, what: str, axis: str
) -> None:
    """Draws mean and standard deviation by timestep: the line averages the pictures, the band is their spread.

    mean, deviation: (timesteps, pictures), each over one picture's values; what: the values, axis: the timesteps,
    in words. Figures 3 and 4 of the paper.
    """
    figure, panels = _figure(2, 10, 4)
    for axes, values, name in zip(panels, (mean, deviation), ("mean", "standard deviation"), strict=True):
        centre, spread = values.mean(axis=1), values.std(axis=1)
        axes.plot(timesteps, centre, "-o", color=OURS, label=f"average of {values.shape[1]} pictures")
        axes.fill_between(timesteps, centre - spread, centre + spread, color=OURS, alpha=0.2, label="their spread")
        axes.set_xlabel(axis)
        axes.set_ylabel(f"{name} of {what}")
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def draw_scatter(
    path: Path, timesteps: Sequence[int], coordinates: np.ndarray, explained: Sequence[float], what: str
) -> None:
    """Draws points by their first two principal components, coloured by timestep (figure 3 of the paper).

    coordinates: (timesteps, pictures, 2); explained: the two components' shares of the variance.
    """
    figure, (axes,) = _figure(1, 6.4, 5)
    colours = np.repeat(np.asarray(timesteps), coordinates.shape[1])
    flat = coordinates.reshape(-1, 2)
    drawn = axes.scatter(flat[:, 0], flat[:, 1], c=colours, cmap=COLOURS, s=24)
    figure.colorbar(drawn, ax=axes, label="timestep")
    for label, set_label, share in zip("12", (axes.set_xlabel, axes.set_ylabel), explained, strict=True):
        set_label(f"component {label} ({100 * share:.0f} % of the variance)")
    axes.set_title(f"principal components of {what}")
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str]) -> None:
    """Draws pictures in a grid with labelled rows and columns.

    rows: (label, pictures), pictures: (columns, H, W, 3) in [0, 1].
    """
    figure = Figure(figsize=(2.2 * len(columns) + 0.6, 2.4 * len(rows)), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for (label, pictures), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(label)
        for picture, axes in zip(pictures, line, strict=True):
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
    for title, axes in zip(columns, grid[0], strict=True):
        axes.set_title(title)
    _save(figure, path)


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
