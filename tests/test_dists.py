from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.evaluation.test_set import read_picture
from training.metrics.dists import DISTS
from training.metrics.pretrained import LpipsWeightsError
from training.metrics.registry import Metrics


@pytest.fixture(scope="module")
def dists() -> DISTS:
    try:
        return DISTS()
    except LpipsWeightsError as error:
        pytest.skip(f"needs the weights of DISTS, which could not be fetched: {error}")


@pytest.fixture(scope="module")
def crop(photo_truth: Path) -> Tensor:
    """(1, 3, 128, 128) in [0, 1]."""
    return read_picture(photo_truth)[..., 100:228, 100:228]


def blurred(image: Tensor) -> Tensor:
    small = torch.nn.functional.interpolate(image, scale_factor=0.25, mode="area")
    return torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear")


def test_zero_for_the_same_symmetric_and_growing(dists: DISTS, crop: Tensor) -> None:
    a, b = crop * 2 - 1, blurred(crop) * 2 - 1
    assert dists(a, a).item() == pytest.approx(0, abs=1e-5)
    assert dists(a, b).item() == pytest.approx(dists(b, a).item(), abs=1e-6)
    slight = dists(a, 0.7 * a + 0.3 * b).item()
    assert 0.005 < slight < dists(a, b).item() < 1


def test_moved_texture_counts_less_than_its_loss(dists: DISTS) -> None:
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved, flat = noise.roll((7, 5), dims=(2, 3)), noise.mean(dim=(2, 3), keepdim=True).expand_as(noise)
    assert dists(noise, moved) < 0.5 * dists(noise, flat)


def test_weights_are_shares(dists: DISTS) -> None:
    assert dists.alpha.shape == dists.beta.shape == (3 + 64 + 128 + 256 + 512 + 512,)
    assert (dists.alpha.sum() + dists.beta.sum()).item() == pytest.approx(1, abs=1e-5)
    assert min(dists.alpha.min(), dists.beta.min()) >= 0


def test_pictures_of_a_batch_do_not_mix(dists: DISTS, crop: Tensor) -> None:
    a = torch.cat([crop, crop.flip(3)]) * 2 - 1
    b = torch.cat([blurred(crop), crop]) * 2 - 1
    together = dists(a, b)
    assert together.shape == (2,)
    assert torch.allclose(together, torch.cat([dists(a[i : i + 1], b[i : i + 1]) for i in range(2)]), atol=1e-5)


def test_evaluation_measures_it_without_pyiqa(dists: DISTS, crop: Tensor) -> None:
    metrics = Metrics(["psnr", "dists"])
    assert metrics.names == ["psnr", "dists"] and not metrics.missing
    scores = metrics.scorer(crop)(blurred(crop))
    assert scores["dists"] == pytest.approx(dists(crop * 2 - 1, blurred(crop) * 2 - 1).item(), abs=1e-6)
    assert metrics.scorer(None)(crop) == {}


def test_the_released_value(dists: DISTS) -> None:
    """Recorded from DISTS_pytorch 0.1 with the same VGG16, for a ramp with and without stripes."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    stripes = (torch.arange(64) // 4 % 2).float().expand(1, 3, 64, 64)
    image = 0.5 * ramp + 0.5 * stripes
    assert dists(image * 2 - 1, ramp * 2 - 1).item() == pytest.approx(0.43823, abs=1e-4)
