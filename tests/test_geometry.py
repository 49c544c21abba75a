"""Sizes, padding and crops, over odd, tiny and lopsided pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.geometry import (
    MIN_NETWORK_SIDE,
    Padding,
    crop_padding,
    crop_to_shape,
    enlarge,
    pad_to_multiple,
    padding_for,
    reflected_indices,
    resize_bicubic,
    target_size,
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
