"""The seam check: what has none, and what has one."""

from __future__ import annotations

import pytest
import torch
from tiled_run import in_tiles
from torch import Tensor
from torch.nn import functional as F

from benchmarks.seams import seam_ratio
from tadsr.geometry import plan_tiles
from tadsr.tiling import Tiler

FACTOR = 8
PLAN = plan_tiles(40, 64, tile=32, overlap=8)
NO_SEAM = 1.05  # the target


def gradient() -> Tensor:
    down, across = torch.linspace(0, 1, 40 * FACTOR), torch.linspace(0, 0.5, 64 * FACTOR)
    return (down[:, None] + across).expand(1, 3, -1, -1)


def test_smooth_gradient_has_none() -> None:
    assert seam_ratio(gradient(), PLAN, FACTOR) == pytest.approx(1.0, abs=1e-3)


def test_noise_has_none() -> None:
    noise = torch.rand(1, 3, 40 * FACTOR, 64 * FACTOR, generator=torch.Generator().manual_seed(0))
    assert seam_ratio(noise, PLAN, FACTOR) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("axis", [-2, -1])
def test_a_step_of_one_grey_level_shows(axis: int) -> None:
    image = gradient().clone()
    border = (PLAN.rows if axis == -2 else PLAN.columns)[1] * FACTOR
    image.narrow(axis, border, image.shape[axis] - border).add_(1 / 255)
    assert seam_ratio(image, PLAN, FACTOR) > NO_SEAM


def test_a_grid_of_the_decoder_is_no_seam() -> None:
    image = gradient().clone()
    image[..., ::FACTOR] += 0.05
    image[..., ::FACTOR, :] += 0.05
    assert seam_ratio(image, PLAN, FACTOR) == pytest.approx(1.0, abs=1e-3)


def test_one_tile_and_a_flat_picture_have_none() -> None:
    assert seam_ratio(gradient(), plan_tiles(40, 64, tile=64, overlap=0), FACTOR) == 1.0
    flat = torch.zeros(1, 3, 40 * FACTOR, 64 * FACTOR)
    assert seam_ratio(flat, PLAN, FACTOR) == 1.0
    flat[..., PLAN.columns[1] * FACTOR :] = 1 / 255
    assert seam_ratio(flat, PLAN, FACTOR) == float("inf")


def test_what_borders_of_tiles_spoil_does_not_show_in_a_smooth_gradient() -> None:
    """A blur that takes what is beyond a tile for black darkens its border by half."""
    tiler = Tiler(source_factor=FACTOR, result_factor=FACTOR)
    result = in_tiles(lambda x: F.avg_pool2d(x, 9, 1, 4), tiler, gradient(), PLAN)
    assert 1 / NO_SEAM < seam_ratio(result, PLAN, FACTOR) < NO_SEAM
