"""Measures whether the borders of tiles can be seen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tadsr.geometry import TilePlan

NEIGHBOURS = 4  # steps on either side, one latent pixel apart, that a border is compared with


def seam_ratio(image: Tensor, plan: TilePlan, factor: int) -> float:
    """Returns the mean absolute step across the borders of tiles over that beside them: 1 where no seam shows.

    Beside them: up to 4 latent pixels away, at the same place in a latent pixel's grid, as decoders draw a faint grid
    of their own. image: (..., H, W), the picture of the plan; factor: its pixels per latent pixel. 1 for one tile.
    """
    ratios = [
        _steps(image, plan.rows, plan.tile_height, factor),
        _steps(image.transpose(-2, -1), plan.columns, plan.tile_width, factor),
    ]
    across = sum(step for step, _ in ratios)
    beside = sum(step for _, step in ratios)
    return across / beside if beside > 0 else 1.0 if across == 0 else float("inf")


def _steps(image: Tensor, starts: Sequence[int], tile: int, factor: int) -> tuple[float, float]:
    """Returns the mean absolute step from row to row, summed over borders: across each border, and beside it."""
    length = image.shape[-2] // factor
    borders = {*starts[1:], *(start + tile for start in starts[:-1])}

    def step(row: int) -> float:
        upper, lower = image[..., row * factor - 1, :], image[..., row * factor, :]
        return float((lower.float() - upper.float()).abs().mean())

    across = beside = 0.0
    for border in borders:
        near = [row for row in range(border - NEIGHBOURS, border + NEIGHBOURS + 1) if 0 < row < length]
        near = [row for row in near if row not in borders]
        if near:
            across += step(border)
            beside += sum(step(row) for row in near) / len(near)
    return across, beside
