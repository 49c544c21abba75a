"""Cuts a picture into tiles for a network, and blends what it makes of them.

The same code serves to encode, predict and decode: a network turns (B, C, h, w) into (B, C', f h, f w), and tiles are
planned on the latent's grid, of which the source and the result are multiples. It calls no network: a `Tiling` is a
generator that asks for the results of tiles, so that who runs the network, and knows its memory, stands next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .geometry import Region, TilePlan, plan_tiles

Network = Callable[[Tensor], Tensor]
OnTiles = Callable[[int, int, Tensor], None]  # is given the tiles done, tiles in all and the picture so far

# Of the neighbour's weight to a tile's own at that tile's border, which then counts 0.005 %. Measured with tadsr-mini
# on a smooth gradient: with 6, 0.2 % of what a border spoils made a seam ratio of 1.37 where 1.05 is allowed.
EDGE_LOG_ODDS = 10.0
SMALLEST_TILE = 16  # latent pixels; in a smaller one hardly a pixel is out of reach of the border

# Gives batches of tiles, (n, C, h, w); is sent the network's result for each tile, (1, C', f h, f w), or None where
# memory was too short for the batch; returns the blended picture, (1, C', H, W) float32 on the device of the source.
Tiling = Generator[Tensor, "Sequence[Tensor] | None", Tensor]


class SmallestTileError(RuntimeError):
    """Even the smallest tile does not fit in memory."""


class UnusableTileError(RuntimeError):
    """A network gave NaN or infinity for a tile, and in full precision too."""


def _nothing(*_: object) -> None:
    pass


@dataclass(kw_only=True)
class Tiler:
    """Cuts pictures into tiles for one network; what it learns about memory holds for the tiles that follow."""

    source_factor: int  # pixels of the source per latent pixel, along each side
    result_factor: int  # the same of the result
    batch: int = 1  # tiles at a time; falls when memory is short
    smallest: int = SMALLEST_TILE  # latent pixels of a side; tiles are not cut smaller
    largest: int | None = field(default=None, init=False)  # latent pixels of a side that fit; None: no limit met

    def tiling(
        self,
        source: Tensor,
        plan: TilePlan,
        region: Region | None = None,
        on_tiles: OnTiles = _nothing,
    ) -> Tiling:
        """Returns the dialogue about one picture.

        source: (1, C, H, W), any float type. region: the part wanted, in latent pixels; only the tiles that it needs
        are asked for, and its pixels are those of the whole. Raises SmallestTileError where no size of tile fits in
        memory, and whatever `on_tiles` raises.
        """
        return self._blend(source, plan, region or plan.whole, on_tiles)

    def _blend(self, source: Tensor, plan: TilePlan, region: Region, on_tiles: OnTiles) -> Tiling:
        canvas = _Canvas(plan, region, self.result_factor)
        tiles = plan.tiles_for(region)
        done = 0
        while done < len(tiles):
            results = yield from self._first_of(tiles[done : done + self.batch], source, plan)
            for tile, result in zip(tiles[done:], results, strict=False):
                canvas.add(tile, result.to(source.device, torch.float32))
            done += len(results)
            if results:
                on_tiles(done, len(tiles), canvas.image)
        return canvas.image

    def _first_of(
        self, tiles: Sequence[Region], source: Tensor, plan: TilePlan
    ) -> Generator[Tensor, Sequence[Tensor] | None, Sequence[Tensor]]:
        """Returns the results of the first of `tiles`: of all, or of fewer or none where memory is short."""
        parts = [tile.scaled(self.source_factor).crop(source) for tile in tiles]
        if self.largest is not None and max(plan.tile_height, plan.tile_width) > self.largest:
            smaller = _plan_within(plan, self.largest)
            return [(yield from self._blend(parts[0], smaller, smaller.whole, _nothing))]
        results = yield torch.cat(parts)
        if results is None:
            self._shrink(plan, len(parts))
            return []
        return results

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


def may_be_wrong(result: Tensor, part: Tensor) -> bool:
    """Returns whether a network's result for a tile should be made again in full precision.

    A flat one may be right, as of a white sky; so it is no error where it stays flat.
    """
    return not _is_finite(result) or (_is_flat(result) and not _is_flat(part))


def check_finite(result: Tensor, part: Tensor, *, in_float32: bool) -> Tensor:
    """Returns the result of a tile; raises UnusableTileError for NaN or infinity. in_float32: it was made again so."""
    if not _is_finite(result):
        raise UnusableTileError(
            f"a tile of {part.shape[-1]}x{part.shape[-2]} pixels came out with NaN or infinite values"
            f"{' in full precision too' if in_float32 else ''}: the weights are damaged or do not belong together"
        )
    return result


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
        pasted = tile.scaled(self.factor)
        part = pasted.intersection(self.region)
        part.relative_to(self.region).crop(self.image).add_(part.relative_to(pasted).crop(weighted))
