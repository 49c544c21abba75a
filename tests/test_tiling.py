"""Tiled runs: blend, regions, short memory, unusable tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nearly import assert_nearly
from tiled_run import in_tiles
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.geometry import Region, plan_tiles
from tadsr.tiling import SmallestTileError, Tiler, UnusableTileError, blend_weights, check_finite, may_be_wrong

TOLERANCE = 1e-5  # float32


def picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def enlarge_twice(x: Tensor) -> Tensor:
    """Works on each pixel alone: tiled equals untiled to rounding."""
    return F.interpolate(x * 2 - 1, scale_factor=2)


def twice(**options: Any) -> Tiler:
    """Returns what cuts pictures for a network that enlarges them twice."""
    return Tiler(source_factor=1, result_factor=2, **options)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (33, 57), (128, 64), (7, 140)])
@pytest.mark.parametrize(("tile", "overlap", "batch"), [(16, 4, 1), (32, 0, 3), (24, 23, 2), (500, 8, 4)])
def test_tiles_of_any_size_equal_the_whole(size: tuple[int, int], tile: int, overlap: int, batch: int) -> None:
    source = picture(*size)
    plan = plan_tiles(*size, tile=tile, overlap=overlap)
    result = in_tiles(enlarge_twice, twice(batch=batch), source, plan)
    assert result.dtype is torch.float32
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)


def test_source_finer_than_the_latent() -> None:
    source = picture(40 * 4, 30 * 4)
    plan = plan_tiles(40, 30, tile=16, overlap=4)
    result = in_tiles(lambda x: F.avg_pool2d(x, 4), Tiler(source_factor=4, result_factor=1), source, plan)
    assert torch.allclose(result, F.avg_pool2d(source, 4), atol=TOLERANCE)


def test_convolution_sees_no_border_where_the_overlap_hides_it() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    source = picture(48, 80)
    tiler = Tiler(source_factor=1, result_factor=1)
    tiled = in_tiles(layer, tiler, source, plan_tiles(48, 80, tile=32, overlap=8))
    difference = (tiled - layer(source)).abs().max()
    butted = in_tiles(layer, tiler, source, plan_tiles(48, 80, tile=32, overlap=0))
    assert difference < 0.01 * (butted - layer(source)).abs().max()


@pytest.mark.parametrize("factor", [1, 4])
def test_weights_sum_to_one_and_fade_towards_borders(factor: int) -> None:
    plan = plan_tiles(100, 1, tile=32, overlap=6)
    weights = blend_weights(100, plan.rows, plan.tile_height, factor)
    total = torch.zeros(100 * factor)
    for start, row in weights.items():
        total[start * factor : (start + plan.tile_height) * factor] += row
    assert torch.allclose(total, torch.ones_like(total))
    second = weights[plan.rows[1]]
    assert second.max() == 1.0, "the middle of a tile is its own"
    assert second[0] < 0.01, "a tile must have faded out at its border"
    assert second[: plan.tile_height * factor // 2].diff().min() >= -TOLERANCE


@pytest.mark.parametrize("region", [Region(0, 0, 5, 5), Region(30, 41, 20, 17), Region(0, 0, 64, 90)])
def test_region_has_the_pixels_of_the_whole(region: Region) -> None:
    source, plan = picture(64, 90), plan_tiles(64, 90, tile=32, overlap=8)
    calls = []

    def blur(x: Tensor) -> Tensor:
        calls.append(len(x))
        return F.interpolate(F.avg_pool2d(x, 5, stride=1, padding=2), scale_factor=2)

    whole = in_tiles(blur, twice(), source, plan)
    calls.clear()
    assert_nearly(in_tiles(blur, twice(), source, plan, region=region), region.scaled(2).crop(whole))
    assert len(calls) == len(plan.tiles_for(region)), "only the tiles that the region needs"


def test_progress_counts_each_tile_once() -> None:
    seen = []
    plan = plan_tiles(40, 40, tile=16, overlap=4)

    def on_tiles(done: int, total: int, image: Tensor) -> None:
        seen.append((done, total, image.shape))

    in_tiles(enlarge_twice, twice(batch=4), picture(40, 40), plan, on_tiles=on_tiles)
    assert [(done, total) for done, total, _ in seen] == [(4, 9), (8, 9), (9, 9)]
    assert seen[0][2] == (1, 3, 80, 80)


def test_an_exception_of_the_progress_callback_stops_the_run() -> None:
    calls = []

    def network(x: Tensor) -> Tensor:
        calls.append(1)
        return enlarge_twice(x)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan = plan_tiles(40, 40, tile=16, overlap=4)
        in_tiles(network, twice(), picture(40, 40), plan, on_tiles=interrupt)
    assert len(calls) == 1


class Memory:
    """A network that holds `pixels` at most, and notes what it was given."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.finished: list[tuple[int, int, int]] = []
        self.refused = 0

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if batch * height * width > self.pixels:
            self.refused += 1
            raise torch.OutOfMemoryError
        self.finished.append((batch, height, width))
        return enlarge_twice(x)


def test_short_memory_first_halves_the_batch() -> None:
    memory, source = Memory(2 * 16 * 16), picture(40, 40)
    tiler = twice(batch=8)
    result = in_tiles(memory, tiler, source, plan_tiles(40, 40, tile=16, overlap=4))
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)
    assert (tiler.batch, tiler.largest, memory.refused) == (2, None, 2)


def test_short_memory_then_cuts_the_tiles_and_stays_small() -> None:
    memory, source, tiler = Memory(20 * 20), picture(120, 120), twice(smallest=8)
    at_each_call = []

    def network(x: Tensor) -> Tensor:
        at_each_call.append((tiler.batch, tiler.largest))
        return memory(x)

    result = in_tiles(network, tiler, source, plan_tiles(120, 120, tile=64, overlap=4))
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)
    shrunk = [state for state, _ in itertools.groupby(at_each_call)]
    assert shrunk == [(1, None), (1, 31), (1, 12)], "the second and later tiles must start at the smaller size"
    assert memory.refused == 2


def test_finished_tiles_stay_when_memory_runs_out_later() -> None:
    memory, source = Memory(64 * 64), picture(64, 160)
    plan = plan_tiles(64, 160, tile=64, overlap=8)

    def someone_else_takes_memory(done: int, total: int, image: Tensor) -> None:
        memory.pixels = 40 * 40

    result = in_tiles(memory, twice(), source, plan, on_tiles=someone_else_takes_memory)
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)
    whole = (1, plan.tile_height, plan.tile_width)
    assert memory.finished[0] == whole and memory.finished.count(whole) == 1


def test_too_little_memory_for_the_smallest_tile_names_it() -> None:
    with pytest.raises(SmallestTileError, match=r"too short for \d+x\d+ latent pixels"):
        in_tiles(Memory(10), twice(), picture(120, 120), plan_tiles(120, 120, tile=64, overlap=4))


@pytest.mark.parametrize("overlap", [0, 8, 31])
@pytest.mark.parametrize("multiple", [1, 8])
def test_cutting_comes_to_an_end(overlap: int, multiple: int) -> None:
    plan = plan_tiles(100, 333, tile=32, overlap=overlap, multiple=multiple)
    with pytest.raises(SmallestTileError):
        in_tiles(Memory(0), twice(smallest=1), picture(100, 333), plan)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_result_with_one_value_that_is_no_number_is_made_again_and_then_an_error(wrong: float) -> None:
    tile = picture(16, 24)
    result = enlarge_twice(tile)
    assert not may_be_wrong(result, tile) and check_finite(result, tile, in_float32=False) is result
    result[0, 1, 5, 7] = wrong
    assert may_be_wrong(result, tile)
    for in_float32, words in ((True, "values in full precision too: the weights"), (False, "values: the weights")):
        with pytest.raises(UnusableTileError, match=f"a tile of 24x16 pixels came out with NaN or infinite {words}"):
            check_finite(result, tile, in_float32=in_float32)


def test_a_flat_result_is_made_again_where_the_tile_is_not_flat_and_may_stay() -> None:
    """A sky may be clamped to white in full precision too."""
    tile, flat = picture(16, 24), torch.full((1, 3, 16, 24), 0.5)
    white = torch.ones(1, 3, 32, 48)
    assert may_be_wrong(white, tile)
    assert not may_be_wrong(white, flat)
    assert check_finite(white, tile, in_float32=True) is white
