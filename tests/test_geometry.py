"""Sizes, padding and crops, over odd, tiny and lopsided pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.geometry import (
    MIN_NETWORK_SIDE,
    MIN_THUMBNAIL_SIDE,
    Padding,
    Region,
    crop_padding,
    crop_to_shape,
    enlarge,
    pad_to_multiple,
    padding_for,
    plan_tiles,
    reflected_indices,
    resize_bicubic,
    target_size,
    thumbnail_size,
)

SIZES = [(1, 1), (1, 7), (9, 1), (2, 3), (5, 64), (63, 65), (64, 64), (127, 250), (333, 81)]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((1, 1), 4.0, (4, 4)),
        ((33, 57), 4.0, (132, 228)),
        ((10, 10), 1.25, (12, 12)),
        ((3, 5), 1.0, (3, 5)),
        ((7, 1000), 8.0, (56, 8000)),
    ],
)
def test_scale_multiplies_both_sides(size: tuple[int, int], scale: float, expected: tuple[int, int]) -> None:
    assert target_size(*size, scale=scale) == expected


def test_exact_target_wins_and_a_missing_side_keeps_the_proportions() -> None:
    assert target_size(100, 150, target=(1080, 1920)) == (1080, 1920)
    assert target_size(100, 150, target=(1000, 0)) == (1000, 1500)
    assert target_size(100, 150, target=(0, 751)) == (501, 751)
    assert target_size(1, 1000, target=(0, 100)) == (1, 100), "a side never falls to 0"


@pytest.mark.parametrize("scale", [0.0, 0.5, 8.5, -4.0, float("nan")])
def test_scale_out_of_range_is_named(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale is .*accepted are 1\.\.8"):
        target_size(10, 10, scale=scale)


def test_sides_and_megapixels_keep_the_proportions_and_are_exact() -> None:
    assert target_size(100, 150, longest_side=2048) == (1365, 2048)
    assert target_size(150, 100, longest_side=2047) == (2047, 1365)
    assert target_size(100, 150, shortest_side=1081) == (1081, 1622)
    assert target_size(1000, 1500, longest_side=750) == (500, 750), "smaller than the input is a size, too"
    assert target_size(100, 100, megapixels=4.0) == (2000, 2000)
    height, width = target_size(1333, 777, megapixels=8.3)
    assert abs(height * width / 8.3e6 - 1) < 1e-3
    assert target_size(1, 1000, longest_side=100) == (1, 100)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"longest_side": 16385}, r"16385x10923 pixels; accepted are sides of 1\.\.16384"),
        ({"shortest_side": -1}, r"shortest_side -1 and"),
        ({"megapixels": 1e6}, r"accepted are sides of 1\.\.16384"),
        ({"megapixels": float("nan")}, "megapixels nan; accepted"),
        ({"longest_side": 2000, "target": (0, 1000)}, "longest_side 2000, width 1000; accepted is one of them"),
        ({"shortest_side": 500, "megapixels": 2.0}, "shortest_side 500, megapixels 2; accepted is one of them"),
    ],
)
def test_sizes_that_cannot_be_are_said(wanted: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        target_size(100, 150, **wanted)


def test_too_large_a_result_names_the_limit() -> None:
    with pytest.raises(ValueError, match=r"24000x8 pixels; accepted are sides of 1\.\.16384"):
        target_size(1, 3000, scale=8.0)


@pytest.mark.parametrize("multiple", [4, 8, 64])
@pytest.mark.parametrize("size", SIZES)
def test_padding_reaches_a_multiple_and_crops_back_exactly(size: tuple[int, int], multiple: int) -> None:
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    padded, padding = pad_to_multiple(image, multiple)
    assert all(side % multiple == 0 and side >= MIN_NETWORK_SIDE for side in padded.shape[-2:])
    assert torch.equal(crop_padding(padded, padding), image)
    assert padding == padding_for(*size, multiple)


def test_padding_is_torch_reflection_where_torch_can() -> None:
    image = torch.rand(1, 3, 70, 66)
    padded, padding = pad_to_multiple(image, 8)
    assert padding == Padding(bottom=2, right=6)
    assert torch.equal(padded, torch.nn.functional.pad(image, (0, 6, 0, 2), mode="reflect"))


def test_no_padding_returns_the_same_picture() -> None:
    image = torch.rand(1, 3, 64, 128)
    assert pad_to_multiple(image, 8)[0] is image


def test_reflection_goes_back_and_forth() -> None:
    assert reflected_indices(3, 9) == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert reflected_indices(1, 4) == [0, 0, 0, 0]
    assert reflected_indices(2, 5) == [0, 1, 0, 1, 0]


def test_crop_keeps_the_centre_and_the_proportions() -> None:
    image = torch.arange(10.0).expand(1, 1, 4, 10)
    assert crop_to_shape(image, (400, 400))[0, 0, 0].tolist() == [3, 4, 5, 6]
    assert crop_to_shape(image, (400, 1000)).shape == image.shape
    assert crop_to_shape(image, (400, 1001)).shape == image.shape, "a rounding difference must not crop"
    assert crop_to_shape(image, (1000, 1)).shape[-1] == 1


def test_bicubic_equals_pillow() -> None:
    pixels = np.random.default_rng(0).random((13, 17), dtype=np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((68, 52), Image.Resampling.BICUBIC))
    ours = resize_bicubic(torch.from_numpy(pixels)[None, None], (52, 68))[0, 0].numpy()
    assert np.abs(ours - expected).max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_enlarging_gives_the_exact_size_in_range(size: tuple[int, int]) -> None:
    result = enlarge(torch.rand(1, 3, *size).round(), (67, 131))
    assert result.shape == (1, 3, 67, 131)
    assert 0.0 <= result.min() and result.max() <= 1.0


LENGTHS = [(1, 1), (1, 300), (64, 64), (65, 64), (127, 250), (20, 400), (512, 511)]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 8), (64, 0), (65, 17), (32, 31), (9, 8)])
@pytest.mark.parametrize("size", LENGTHS)
def test_tiles_are_alike_cover_all_and_overlap(size: tuple[int, int], tile: int, overlap: int, multiple: int) -> None:
    plan = plan_tiles(*size, tile=tile, overlap=overlap, multiple=multiple)
    least = min(overlap, (tile // multiple - 1) * multiple)
    for length, starts, side in zip(size, (plan.rows, plan.columns), (plan.tile_height, plan.tile_width), strict=True):
        assert side <= tile
        assert starts[0] == 0 and starts[-1] + side == length
        assert all(start % multiple == 0 for start in starts[:-1])
        assert all(a < b <= a + side - least for a, b in zip(starts[:-1], starts[1:], strict=True))
        assert len(starts) == 1 or side > least


def test_no_tiny_remainder() -> None:
    plan = plan_tiles(65, 130, tile=64, overlap=8)
    assert (plan.rows, plan.tile_height) == ((0, 28), 37), "two halves rather than one tile and a strip"
    assert (plan.columns, plan.tile_width) == ((0, 40, 81), 49)


def test_overlap_costs_little() -> None:
    """1024-pixel tiles over 16 megapixels, 64 pixels of overlap: the target is 15 % over one megapixel's time."""
    plan = plan_tiles(512, 512, tile=128, overlap=8)
    computed = len(plan.tiles) * plan.tile_height * plan.tile_width
    assert computed / (512 * 512) < 1.15


def test_plan_in_one_piece() -> None:
    plan = plan_tiles(30, 64, tile=64, overlap=63, multiple=8)
    assert plan.is_whole
    assert plan.tiles == (plan.whole,) == (Region(0, 0, 30, 64),)


def test_region_needs_the_tiles_that_it_touches() -> None:
    plan = plan_tiles(10, 22, tile=10, overlap=4)
    assert plan.columns == (0, 6, 12)
    assert [tile.left for tile in plan.tiles_for(Region(0, 0, 2, 6))] == [0]
    assert [tile.left for tile in plan.tiles_for(Region(0, 0, 2, 7))] == [0, 6]
    assert [tile.left for tile in plan.tiles_for(Region(9, 10, 1, 3))] == [6, 12]


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [(32, 32, "overlap is 32"), (32, -1, "overlap is -1"), (0, 0, "tiles of 0"), (7, 0, "tiles of at least 8")],
)
def test_bad_plan_is_named(tile: int, overlap: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_tiles(100, 100, tile=tile, overlap=overlap, multiple=8)


def test_regions() -> None:
    region, other = Region(2, 3, 4, 5), Region(5, 7, 10, 10)
    assert region.intersection(other) == Region(5, 7, 1, 1)
    assert region.overlaps(other) and not region.overlaps(Region(6, 3, 1, 1))
    assert other.relative_to(region) == Region(3, 4, 10, 10)
    assert region.scaled(8) == Region(16, 24, 32, 40)
    image = torch.arange(100).reshape(10, 10)
    assert region.crop(image)[0, 0] == 23 and region.crop(image).shape == (4, 5)


@pytest.mark.parametrize("size", [(100, 100), (40, 400), (8, 999), (400, 30), (512, 2048)])
@pytest.mark.parametrize("area", [1024, 4096, 10**6])
def test_sample_has_the_proportions_of_the_picture_and_about_the_area(size: tuple[int, int], area: int) -> None:
    height, width = thumbnail_size(*size, area=area)
    assert height <= size[0] and width <= size[1]
    assert height >= min(size[0], MIN_THUMBNAIL_SIDE) and width >= min(size[1], MIN_THUMBNAIL_SIDE)
    if min(height, width) > MIN_THUMBNAIL_SIDE:
        assert 0.9 * min(area, size[0] * size[1]) < height * width <= area
        assert height / width == pytest.approx(size[0] / size[1], rel=0.1)


def test_sample_of_a_small_picture_is_the_picture() -> None:
    assert thumbnail_size(30, 40, area=1200) == (30, 40)
    assert thumbnail_size(1, 3, area=1) == (1, 3)
