"""Tiled runs: blend, regions, short memory, unusable tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nearly import assert_nearly
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.geometry import Region, plan_tiles
from tadsr.tiling import Network, SmallestTileError, TiledRun, UnusableTileError, blend_weights

TOLERANCE = 1e-5  # float32


def picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def enlarge_twice(x: Tensor) -> Tensor:
    """Works on each pixel alone: tiled equals untiled to rounding."""
    return F.interpolate(x * 2 - 1, scale_factor=2)


def run_with(network: Network, **options: Any) -> TiledRun:
    return TiledRun(network=network, source_factor=1, result_factor=2, **options)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (33, 57), (128, 64), (7, 140)])
@pytest.mark.parametrize(("tile", "overlap", "batch"), [(16, 4, 1), (32, 0, 3), (24, 23, 2), (500, 8, 4)])
def test_tiles_of_any_size_equal_the_whole(size: tuple[int, int], tile: int, overlap: int, batch: int) -> None:
    source = picture(*size)
    plan = plan_tiles(*size, tile=tile, overlap=overlap)
    result = run_with(enlarge_twice, batch=batch)(source, plan)
    assert result.dtype is torch.float32
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)


def test_source_finer_than_the_latent() -> None:
    source = picture(40 * 4, 30 * 4)
    plan = plan_tiles(40, 30, tile=16, overlap=4)
    run = TiledRun(network=lambda x: F.avg_pool2d(x, 4), source_factor=4, result_factor=1)
    assert torch.allclose(run(source, plan), F.avg_pool2d(source, 4), atol=TOLERANCE)


def test_convolution_sees_no_border_where_the_overlap_hides_it() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    source = picture(48, 80)
    run = TiledRun(network=layer, source_factor=1, result_factor=1)
    tiled = run(source, plan_tiles(48, 80, tile=32, overlap=8))
    difference = (tiled - layer(source)).abs().max()
    butted = run(source, plan_tiles(48, 80, tile=32, overlap=0))
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

    run = run_with(blur)
    whole = run(source, plan)
    calls.clear()
    assert_nearly(run(source, plan, region), region.scaled(2).crop(whole))
    assert len(calls) == len(plan.tiles_for(region)), "only the tiles that the region needs"


def test_progress_counts_each_tile_once() -> None:
    seen = []
    plan = plan_tiles(40, 40, tile=16, overlap=4)
    run = run_with(enlarge_twice, batch=4, on_tiles=lambda done, total, image: seen.append((done, total, image.shape)))
    run(picture(40, 40), plan)
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
        run_with(network, on_tiles=interrupt)(picture(40, 40), plan_tiles(40, 40, tile=16, overlap=4))
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
    run = run_with(memory, batch=8)
    result = run(source, plan_tiles(40, 40, tile=16, overlap=4))
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)
    assert (run.batch, run.largest, memory.refused) == (2, None, 2)


def test_short_memory_then_cuts_the_tiles_and_stays_small() -> None:
    memory, source, shrunk = Memory(20 * 20), picture(120, 120), []
    run = run_with(memory, smallest=8, on_shrink=lambda run: shrunk.append((run.batch, run.largest)))
    result = run(source, plan_tiles(120, 120, tile=64, overlap=4))
    assert torch.allclose(result, enlarge_twice(source), atol=TOLERANCE)
    assert shrunk == [(1, 31), (1, 12)], "the second and later tiles must start at the smaller size"
    assert memory.refused == 2


def test_finished_tiles_stay_when_memory_runs_out_later() -> None:
    memory, source = Memory(64 * 64), picture(64, 160)
    plan = plan_tiles(64, 160, tile=64, overlap=8)

    def someone_else_takes_memory(done: int, total: int, image: Tensor) -> None:
        memory.pixels = 40 * 40

    run = run_with(memory, on_tiles=someone_else_takes_memory)
    assert torch.allclose(run(source, plan), enlarge_twice(source), atol=TOLERANCE)
    whole = (1, plan.tile_height, plan.tile_width)
    assert memory.finished[0] == whole and memory.finished.count(whole) == 1


def test_too_little_memory_for_the_smallest_tile_names_it() -> None:
    with pytest.raises(SmallestTileError, match=r"too short for \d+x\d+ latent pixels"):
        run_with(Memory(10))(picture(120, 120), plan_tiles(120, 120, tile=64, overlap=4))


@pytest.mark.parametrize("overlap", [0, 8, 31])
@pytest.mark.parametrize("multiple", [1, 8])
def test_cutting_comes_to_an_end(overlap: int, multiple: int) -> None:
    plan = plan_tiles(100, 333, tile=32, overlap=overlap, multiple=multiple)
    with pytest.raises(SmallestTileError):
        run_with(Memory(0), smallest=1)(picture(100, 333), plan)


def test_other_exceptions_are_not_taken_for_short_memory() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_with(broken)(picture(40, 40), plan_tiles(40, 40, tile=16, overlap=4))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_unusable_tile_is_made_again(wrong: float) -> None:
    source, plan = picture(40, 40), plan_tiles(40, 40, tile=16, overlap=4)
    calls = []

    def sometimes_wrong(x: Tensor) -> Tensor:
        calls.append(1)
        result = enlarge_twice(x)
        if len(calls) == 2:
            return torch.zeros_like(result) if wrong == 0 else result.index_fill(1, torch.tensor(1), wrong)
        return result

    run = run_with(sometimes_wrong, redo=enlarge_twice)
    assert torch.allclose(run(source, plan), enlarge_twice(source), atol=TOLERANCE)
    assert run.redone == 1


@pytest.mark.parametrize("redo", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_tile_that_stays_unusable_is_an_error(wrong: float, redo: bool) -> None:
    def always(x: Tensor) -> Tensor:
        return torch.full_like(enlarge_twice(x), wrong)

    words = "NaN or infinite values in full precision too" if redo else "NaN or infinite values: "
    with pytest.raises(UnusableTileError, match=words):
        run_with(always, redo=always if redo else None)(picture(40, 40), plan_tiles(40, 40, tile=16, overlap=4))


def test_tile_that_stays_flat_is_kept() -> None:
    """A sky may be clamped to white in full precision too."""

    def white(x: Tensor) -> Tensor:
        return torch.ones_like(enlarge_twice(x))

    run = run_with(white, redo=white)
    assert torch.allclose(run(picture(40, 40), plan_tiles(40, 40, tile=40, overlap=4)), torch.ones(1))
    assert run.redone == 1


def test_flat_source_may_give_a_flat_result() -> None:
    flat = torch.full((1, 3, 40, 40), 0.5)
    assert torch.allclose(run_with(enlarge_twice)(flat, plan_tiles(40, 40, tile=16, overlap=4)), torch.zeros(1))
