"""Which tiles each stage runs in: the one function that both the run and the estimate use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management as mm

from ...tadsr.geometry import MIN_NETWORK_SIDE, Region, TilePlan, padding_for, plan_tiles, thumbnail_size
from ...tadsr.tiling import SMALLEST_TILE
from .memory import pixels_that_fit
from .stages import Stage

TILE_STEP = 8  # pixels; a tile is rounded up to a multiple
THUMBNAIL_SIDE = 768  # pixels of the largest square copy from which statistics are gathered for automatic tiles


@dataclass(frozen=True)
class StagePlan:
    """How one stage runs; latent pixels."""

    stage: Stage
    tiles: TilePlan
    batch: int  # tiles at a time
    area: int  # latent pixels that may be held at a time
    thumbnail_area: int  # the most that the smaller copy may have from which statistics are gathered

    @property
    def needs_statistics(self) -> bool:
        """Whether it runs in tiles, which would disagree without the whole picture's statistics."""
        return not self.tiles.is_whole

    @property
    def pixels(self) -> int:
        """Latent pixels in the network at a time: those of a batch of tiles."""
        return self.batch * self.tiles.tile_height * self.tiles.tile_width

    @property
    def bytes(self) -> int:
        """Bytes of activations at the peak."""
        return self.stage.bytes_for(self.pixels)

    @property
    def work(self) -> int:
        """Latent pixels that go through the network, those of overlaps several times."""
        return self.work_for(self.tiles.whole)

    def work_for(self, region: Region) -> int:
        """Returns the latent pixels that go through the network where only a region is wanted."""
        return len(self.tiles.tiles_for(region)) * self.tiles.tile_height * self.tiles.tile_width


@dataclass(frozen=True)
class Plan:
    """How pictures run through one stage, or through all three."""

    size: tuple[int, int]  # (height, width) of the result, pixels
    stages: tuple[StagePlan, ...]

    @property
    def downscale(self) -> int:
        """Pixels of the result per latent pixel, along each side."""
        return self.stages[0].stage.downscale

    @property
    def thumbnail(self) -> tuple[int, int] | None:
        """(height, width) in latent pixels of the copy that goes with a picture from stage to stage.

        None where no stage needs statistics, and for one stage alone, which makes its own copy where it does.
        """
        if len(self.stages) == 1 or not any(stage.needs_statistics for stage in self.stages):
            return None
        tiles = self.stages[0].tiles
        return thumbnail_size(tiles.height, tiles.width, area=min(stage.thumbnail_area for stage in self.stages))

    @property
    def thumbnail_pixels(self) -> int:
        """Latent pixels of that copy, 0 without one."""
        return math.prod(self.thumbnail) if self.thumbnail else 0

    def regions_needed(self, wanted: Region) -> tuple[Region | None, ...]:
        """Returns the region that each stage must give, latent pixels, for a wanted one in pixels of the result.

        None stands for the whole, where a stage does not run in tiles.
        """
        region = _covering(wanted, self.downscale)
        regions: list[Region | None] = []
        for planned in reversed(self.stages):
            regions.insert(0, None if planned.tiles.is_whole else region)
            region = _around(planned.tiles.tiles_for(region))
        return tuple(regions)


def _covering(region: Region, unit: int) -> Region:
    """Returns the region in units of so many pixels that covers one in pixels."""
    top, left = region.top // unit, region.left // unit
    return Region(top, left, -(-region.bottom // unit) - top, -(-region.right // unit) - left)


def _around(regions: Sequence[Region]) -> Region:
    """Returns the smallest region that holds all."""
    top, left = min(one.top for one in regions), min(one.left for one in regions)
    return Region(top, left, max(one.bottom for one in regions) - top, max(one.right for one in regions) - left)


def plan_upscale(
    stages: Sequence[Stage], size: tuple[int, int], tile: int = 0, overlap: int = 0, *, pictures: int = 0
) -> Plan:
    """Returns how a result of `size` (height, width) pixels is made with the memory that is free now.

    stages: those that a picture goes through. tile, overlap, pictures, and what is raised: see `plan_stage`.
    """
    padded = padded_size(*size, stages[0].downscale)
    options = {"tile": tile, "overlap": overlap, "pictures": pictures}
    return Plan(size, tuple(plan_stage(stage, *padded, **options) for stage in stages))


def padded_size(height: int, width: int, downscale: int) -> tuple[int, int]:
    """Returns (height, width) in latent pixels of a result of height x width pixels, padded for the networks."""
    padding = padding_for(height, width, downscale, MIN_NETWORK_SIDE)
    return (height + padding.bottom) // downscale, (width + padding.right) // downscale


def plan_latent(stage: Stage, height: int, width: int, tile: int = 0, overlap: int = 0) -> Plan:
    """Returns how one stage runs over a latent of height x width pixels; see `plan_stage`."""
    size = (height * stage.downscale, width * stage.downscale)
    return Plan(size, (plan_stage(stage, height, width, tile=tile, overlap=overlap),))


def plan_stage(
    stage: Stage, height: int, width: int, *, tile: int = 0, overlap: int = 0, pictures: int = 0
) -> StagePlan:
    """Returns how a stage runs over a latent of height x width pixels, with the memory that is free now.

    tile: pixels of the result, rounded up to a multiple of 8; 0 is the whole picture where it fits and is not above
    the stage's largest side, else the largest tile that does. overlap: pixels of the result; 0 is the stage's own; at
    most half of a tile chosen automatically. pictures: bytes that the run's pictures take beside. Raises ValueError
    where a tile given is not twice the overlap.
    """
    check_tiles(tile, overlap)
    area = max(SMALLEST_TILE**2, min(pixels_that_fit(stage, pictures), (stage.largest_side // stage.downscale) ** 2))
    if not stage.is_tileable:
        side = max(height, width)
    elif tile:
        side = max(SMALLEST_TILE, rounded_tile(tile) // stage.downscale)
    elif height * width <= area:
        side = max(height, width)
    else:
        side = max(SMALLEST_TILE, math.isqrt(area) // stage.multiple * stage.multiple)
    latent_overlap = min(math.ceil(overlap / stage.downscale) or stage.overlap, side // 2)
    tiles = plan_tiles(height, width, tile=side, overlap=latent_overlap, multiple=stage.multiple)
    while tiles.overlap > (half := _least_cut_side(tiles) // 2):  # tiles of equal size are a little smaller than asked
        tiles = plan_tiles(height, width, tile=side, overlap=half, multiple=stage.multiple)
    at_once = 1 if mm.is_device_cpu(stage.patcher.load_device) else area // (tiles.tile_height * tiles.tile_width)
    batch = max(1, min(at_once, len(tiles.tiles)))
    # With tiles asked for, tiles that equal the whole are worth more than time.
    enough = min(height * width // 4, (THUMBNAIL_SIDE // stage.downscale) ** 2)
    thumbnail_area = area if tile else min(area, max(SMALLEST_TILE**2, enough))
    return StagePlan(stage, tiles, batch, area, thumbnail_area)


def _least_cut_side(tiles: TilePlan) -> int:
    """Returns the shorter side of the tiles, of those sides that are cut; twice the overlap where none is."""
    sides = ((tiles.tile_height, tiles.height), (tiles.tile_width, tiles.width))
    return min((side for side, whole in sides if side < whole), default=2 * tiles.overlap)


def rounded_tile(tile: int) -> int:
    """Returns the tile's side in pixels that is used for one asked for: the next multiple of 8."""
    return -(-tile // TILE_STEP) * TILE_STEP


def check_tiles(tile: int, overlap: int) -> None:
    """Raises ValueError for a tile or overlap, pixels of the result, that no picture can be cut with."""
    if tile < 0 or overlap < 0:
        raise ValueError(f"tile is {tile} and overlap {overlap} pixels; accepted are 0 and more")
    if tile and 2 * overlap > rounded_tile(tile):
        raise ValueError(
            f"overlap is {overlap} pixels and tile {tile}; accepted are overlaps up to half the tile. Choose a smaller "
            f"overlap (0 is automatic), a larger tile, or the tile 0 (automatic)"
        )
