"""Runs a network over a picture tile by tile, and blends the tiles.

The same code encodes, predicts and decodes: a network turns (B, C, h, w) into (B, C', f h, f w), and tiles are planned
on the latent's grid, of which the source and the result are multiples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .geometry import Region, TilePlan, plan_tiles

Network = Callable[[Tensor], Tensor]

# Of the neighbour's weight to a tile's own at that tile's border, which then counts 0.005 %. Measured with tadsr-mini
# on a smooth gradient: with 6, 0.2 % of what a border spoils made a seam ratio of 1.37 where 1.05 is allowed.
EDGE_LOG_ODDS = 10.0
SMALLEST_TILE = 16  # latent pixels; in a smaller one hardly a pixel is out of reach of the border


class SmallestTileError(RuntimeError):
    """Even the smallest tile does not fit in memory."""


class UnusableTileError(RuntimeError):
    """A network gave NaN or infinity for a tile, and in full precision too."""


def _nothing(*_: object) -> None:
    pass


@dataclass(kw_only=True)
class TiledRun:
    """Calls one network on the tiles of a picture; what it learns about memory holds for the tiles that follow."""

    network: Network
    source_factor: int  # pixels of the source per latent pixel, along each side
    result_factor: int  # the same of the result
    batch: int = 1  # tiles at a time; falls when memory is short
    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError,)
    smallest: int = SMALLEST_TILE  # latent pixels of a side; tiles are not cut smaller
    redo: Network | None = None  # the network in full precision, for tiles that come out unusable
    on_shrink: Callable[[TiledRun], None] = _nothing  # after memory ran out, before the next try
    on_tiles: Callable[[int, int, Tensor], None] = _nothing  # tiles done, tiles in all, the picture so far
    largest: int | None = field(default=None, init=False)  # latent pixels of a side that fit; None: no limit met
    redone: int = field(default=0, init=False)  # tiles that `redo` made

    def __call__(self, source: Tensor, plan: TilePlan, region: Region | None = None) -> Tensor:
        """Returns the blended result, (1, C', H, W) float32 on the device of `source`.

        source: (1, C, H, W), any float type. region: the part wanted, in latent pixels; only the tiles that it needs
        run, and its pixels are those of the whole. Raises SmallestTileError where no size of tile fits in memory,
        UnusableTileError for a tile that `redo` does not save, and whatever the network and the callbacks raise.
        """
        return self._blend(source, plan, region or plan.whole, self.on_tiles)

    def _blend(
        self, source: Tensor, plan: TilePlan, region: Region, on_tiles: Callable[[int, int, Tensor], None]
    ) -> Tensor:
        canvas = _Canvas(plan, region, self.result_factor)
        tiles = plan.tiles_for(region)
        done = 0
        while done < len(tiles):
            results = self._first_of(tiles[done : done + self.batch], source, plan)
            for tile, result in zip(tiles[done:], results, strict=False):
                canvas.add(tile, result.to(source.device, torch.float32))
            done += len(results)
            if results:
                on_tiles(done, len(tiles), canvas.image)
        return canvas.image

    def _first_of(self, tiles: Sequence[Region], source: Tensor, plan: TilePlan) -> list[Tensor]:
        """Returns the results of the first of `tiles`: of all, or of fewer or none where memory is short."""
        parts = [tile.scaled(self.source_factor).crop(source) for tile in tiles]
        if self.largest is not None and max(plan.tile_height, plan.tile_width) > self.largest:
            smaller = _plan_within(plan, self.largest)
            return [self._blend(parts[0], smaller, smaller.whole, _nothing)]
        results = self._attempt(torch.cat(parts))
        if results is None:
            self._shrink(plan, len(parts))
            self.on_shrink(self)
            return []
        return results

    def _attempt(self, parts: Tensor) -> list[Tensor] | None:
        """Returns the result of each part, or None where memory ran out."""
        try:
            results = self.network(parts).split(1)
            return [self._usable(result, part) for result, part in zip(results, parts.split(1), strict=True)]
        except self.out_of_memory:
            return None  # the next try comes after this block, whose exception holds the tensors of the failed one

    def _usable(self, result: Tensor, part: Tensor) -> Tensor:
        """Returns the result, made again in full precision where it may be wrong."""
        if self.redo is not None and (not _is_finite(result) or _is_flat(result) and not _is_flat(part)):
            self.redone += 1
            result = self.redo(part)
        if not _is_finite(result):
            raise UnusableTileError(
                f"a tile of {part.shape[-1]}x{part.shape[-2]} pixels came out with NaN or infinite values"
                f"{' in full precision too' if self.redo else ''}: the weights are damaged or do not belong together"
            )
        return result  # that it is flat may be right: a white sky, for example

    def _shrink(self, plan: TilePlan, batch: int) -> None:
        """Halves the batch, or the tile where there was only one, or raises SmallestTileError."""
        if batch > 1:
            self.batch = batch // 2
            return
        side = max(plan.tile_height, plan.tile_width)
        if side // 2 < max(self.smallest, plan.multiple):
            raise SmallestTileError(f"memory is too short for {plan.tile_width}x{plan.tile_height} latent pixels")
        self.largest = side // 2


def _plan_within(plan: TilePlan, largest: int) -> TilePlan:
    """Returns the plan of the parts of one tile, at most `largest` a side, which overlap by half of it at most."""
    overlap = min(plan.overlap, largest // 2)
    return plan_tiles(plan.tile_height, plan.tile_width, tile=largest, overlap=overlap, multiple=plan.multiple)


def _is_finite(result: Tensor) -> bool:
    return bool(torch.stack(result.aminmax()).isfinite().all())  # both are NaN where any value is


def _is_flat(image: Tensor) -> bool:
    low, high = image.aminmax()
    return bool(low == high)


def blend_weights(length: int, starts: Sequence[int], tile: int, factor: int = 1) -> dict[int, Tensor]:
    """Returns, for the tile at each start, its weights along one side: (tile * factor,) float32.

    Gaussians around the tiles' centres, divided by their sum: at each pixel the tiles that hold it sum to 1. Their
    width follows from the overlap, so that a tile fades out towards its border. factor: pixels per unit of the rest.
    """
    if len(starts) == 1:
        return {starts[0]: torch.ones(length * factor)}
    stride = max(b - a for a, b in zip(starts[:-1], starts[1:], strict=True))
    # Two Gaussians at a distance `stride` have log-odds of stride * x / sigma^2 at x from the point between them.
    sigma_squared = max(stride * (tile - stride) / 2, 1 / factor) / EDGE_LOG_ODDS
    positions = (torch.arange(length * factor, dtype=torch.float64) + 0.5) / factor
    distances = positions[None] - torch.tensor(starts, dtype=torch.float64)[:, None]
    logits = -((distances - tile / 2) ** 2) / (2 * sigma_squared)
    logits[(distances < 0) | (distances > tile)] = -torch.inf
    weights = logits.softmax(dim=0).float()
    return {start: row[start * factor : (start + tile) * factor] for start, row in zip(starts, weights, strict=True)}


class _Canvas:
    """Sums the weighted tiles over one region of the picture."""

    def __init__(self, plan: TilePlan, region: Region, factor: int) -> None:
        self.region = region.scaled(factor)
        self.factor = factor
        self.down = blend_weights(plan.height, plan.rows, plan.tile_height, factor)
        self.across = blend_weights(plan.width, plan.columns, plan.tile_width, factor)
        self.image = torch.empty(0)  # made by the first tile, which tells the number of channels

    def add(self, tile: Region, result: Tensor) -> None:
        """Adds a tile's result, (1, C, H, W) float32."""
        if not self.image.numel():
            self.image = result.new_zeros(*result.shape[:2], self.region.height, self.region.width)
        down, across = self.down[tile.top].to(result), self.across[tile.left].to(result)
        weighted = result * down[:, None] * across
        placed = tile.scaled(self.factor)
        part = placed.intersection(self.region)
        part.relative_to(self.region).crop(self.image).add_(part.relative_to(placed).crop(weighted))
