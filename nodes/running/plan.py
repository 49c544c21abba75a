"""Which tiles each phase runs in: the one function that both the run and the estimate use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management as mm

from ...tadsr.geometry import MIN_NETWORK_SIDE, Region, TilePlan, padding_for, plan_tiles, thumbnail_size
from ...tadsr.tiling import SMALLEST_TILE
from .memory import PREDICT, Cost, decoder_cost, encoder_cost, pixels_that_fit, prediction_cost

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

    from ..models.encoder import TimeAwareEncoderModel

# Automatic overlaps in latent pixels, measured: docs/performance.md. A VAE sees further the more often it halves.
OVERLAP_PER_DOWNSCALE = {"encode": 4, "decode": 3}
UNET_OVERLAP = 16
TILE_STEP = 8  # pixels; a tile is rounded up to a multiple
# Side of the largest square, in pixels, that is done at once though memory would hold more: attention grows with the
# square of the area, so that a larger one takes longer than the same area in tiles.
LARGEST_SIDE = {"encode": 1536, PREDICT: 1024, "decode": 1536}
SAMPLE_SIDE = 768  # pixels of the largest square copy from which statistics are gathered for automatic tiles


@dataclass(frozen=True)
class PhasePlan:
    """How one phase runs; latent pixels."""

    cost: Cost
    tiles: TilePlan
    batch: int  # tiles at a time
    area: int  # latent pixels that may be held at a time
    sample_area: int  # the most that the smaller copy may have from which statistics are gathered

    @property
    def needs_statistics(self) -> bool:
        """Whether its tiles would disagree without the whole picture's statistics; a UNet's hardly do."""
        return not self.tiles.is_whole and self.cost.phase != PREDICT

    @property
    def pixels(self) -> int:
        """Latent pixels in the network at a time: those of a batch of tiles."""
        return self.batch * self.tiles.tile_height * self.tiles.tile_width

    @property
    def bytes(self) -> int:
        """Bytes of activations at the peak."""
        return self.cost.bytes_for(self.pixels)

    @property
    def work(self) -> int:
        """Latent pixels that go through the network, those of overlaps several times."""
        return self.work_for(self.tiles.whole)

    def work_for(self, region: Region) -> int:
        """Returns the latent pixels that go through the network where only a region is wanted."""
        return len(self.tiles.tiles_for(region)) * self.tiles.tile_height * self.tiles.tile_width


def padded_size(height: int, width: int, downscale: int) -> tuple[int, int]:
    """Returns (height, width) in latent pixels of a result of height x width pixels, padded for the networks."""
    padding = padding_for(height, width, downscale, MIN_NETWORK_SIDE)
    return (height + padding.bottom) // downscale, (width + padding.right) // downscale


def plan_phase(
    cost: Cost, height: int, width: int, *, tile: int = 0, overlap: int = 0, whole: bool = False
) -> PhasePlan:
    """Returns how a phase runs over a latent of height x width pixels, with the memory that is free now.

    tile: pixels of the result, rounded up to a multiple of 8; 0 is the whole picture where it fits and is not above
    LARGEST_SIDE, else the largest tile that does. overlap: pixels of the result; 0 is automatic; at most half of a tile
    chosen automatically. whole: never cut. Raises ValueError where a tile given is not twice the overlap.
    """
    check_tiles(tile, overlap)
    area = max(SMALLEST_TILE**2, min(pixels_that_fit(cost), (LARGEST_SIDE[cost.phase] // cost.downscale) ** 2))
    automatic = UNET_OVERLAP if cost.phase == PREDICT else OVERLAP_PER_DOWNSCALE[cost.phase] * cost.downscale
    latent_overlap = math.ceil(overlap / cost.downscale) or automatic
    if whole:
        side = max(height, width)
    elif tile:
        side = max(SMALLEST_TILE, rounded_tile(tile) // cost.downscale)
    elif height * width <= area:
        side = max(height, width)
    else:
        side = max(SMALLEST_TILE, math.isqrt(area) // cost.multiple * cost.multiple)
    tiles = plan_tiles(height, width, tile=side, overlap=min(latent_overlap, side // 2), multiple=cost.multiple)
    at_once = 1 if mm.is_device_cpu(cost.patcher.load_device) else area // (tiles.tile_height * tiles.tile_width)
    batch = max(1, min(at_once, len(tiles.tiles)))
    # With tiles asked for, tiles that equal the whole are worth more than time.
    enough = min(height * width // 4, (SAMPLE_SIDE // cost.downscale) ** 2)
    sample_area = area if tile else min(area, max(SMALLEST_TILE**2, enough))
    return PhasePlan(cost, tiles, batch, area, sample_area)


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


@dataclass(frozen=True)
class UpscalePlan:
    """How a picture runs through all phases."""

    height: int  # of the result, pixels
    width: int
    phases: tuple[PhasePlan, PhasePlan, PhasePlan]  # encode, predict, decode

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result, pixels."""
        return self.height, self.width

    @property
    def downscale(self) -> int:
        """Pixels of the result per latent pixel, along each side."""
        return self.phases[0].cost.downscale

    @property
    def sample(self) -> tuple[int, int] | None:
        """(height, width) in latent pixels of the copy that gives statistics; None where none needs them."""
        return sample_of(self.phases)

    @property
    def sample_pixels(self) -> int:
        """Latent pixels of that copy, 0 without one."""
        return self.sample[0] * self.sample[1] if self.sample else 0


def sample_of(phases: Sequence[PhasePlan]) -> tuple[int, int] | None:
    """Returns (height, width), latent pixels, of the copy that gives statistics to all; None if none needs them."""
    if not any(phase.needs_statistics for phase in phases):
        return None
    tiles = phases[0].tiles
    return thumbnail_size(tiles.height, tiles.width, area=min(phase.sample_area for phase in phases))


def plan_upscale(
    model: ModelPatcher,
    encoder: TimeAwareEncoderModel,
    vae: comfy.sd.VAE,
    size: tuple[int, int],
    tile: int = 0,
    overlap: int = 0,
    predict_whole: bool = False,
) -> UpscalePlan:
    """Returns how a result of `size` (height, width) pixels is made with the memory that is free now.

    tile, overlap: see `plan_phase`, which also says what is raised. predict_whole: the UNet is not to be cut.
    """
    padded = padded_size(*size, encoder.downscale)
    encode, predict, decode = (
        plan_phase(cost, *padded, tile=tile, overlap=overlap, whole=predict_whole and cost.phase == PREDICT)
        for cost in (encoder_cost(encoder), prediction_cost(model), decoder_cost(vae))
    )
    return UpscalePlan(*size, (encode, predict, decode))


def regions_needed(phases: Sequence[PhasePlan], wanted: Region, downscale: int) -> list[Region | None]:
    """Returns the region that each phase must give, latent pixels, for a wanted one in pixels of the result.

    None stands for the whole, where a phase does not run in tiles.
    """
    top, left = wanted.top // downscale, wanted.left // downscale
    bottom, right = -(-wanted.bottom // downscale), -(-wanted.right // downscale)
    region = Region(top, left, bottom - top, right - left)
    regions: list[Region | None] = []
    for phase in reversed(phases):
        regions.insert(0, None if phase.tiles.is_whole else region)
        tiles = phase.tiles.tiles_for(region)
        top, left = min(tile.top for tile in tiles), min(tile.left for tile in tiles)
        bottom, right = max(tile.bottom for tile in tiles), max(tile.right for tile in tiles)
        region = Region(top, left, bottom - top, right - left)
    return regions
