from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from training.metrics.lpips import LPIPS
from training.metrics.reference import Reference, luma, psnr_y, ssim


@pytest.fixture(scope="module")
def alex(lpips_network: Callable[[str], LPIPS]) -> LPIPS:
    return lpips_network("alex")


def pictures() -> tuple[Tensor, Tensor]:
    """A smooth picture twice, and two noisy versions, the second noisier: (2, 3, 40, 48) in [0, 1]."""
    rng = np.random.default_rng(4)
    smooth = ndimage.gaussian_filter(rng.random((3, 40, 48)), (0, 3, 3))
    clean = torch.from_numpy(np.stack([smooth, smooth])).float()
    amount = torch.tensor([0.02, 0.08]).view(2, 1, 1, 1)
    return (clean + amount * torch.from_numpy(rng.standard_normal((2, 3, 40, 48))).float()).clamp(0, 1), clean


def flat(value: float) -> Tensor:
    return torch.full((1, 3, 16, 16), value)


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [((0, 0, 0), 16), ((1, 1, 1), 235), ((1, 0, 0), 81.481), ((0, 1, 0), 144.553), ((0, 0, 1), 40.966)],
)
def test_luma_is_that_of_bt601(rgb: tuple[float, float, float], expected: float) -> None:
    assert luma(torch.tensor(rgb).view(1, 3, 1, 1)).item() * 255 == pytest.approx(expected)


def test_psnr_of_a_known_difference() -> None:
    decibels = psnr_y(flat(0.6), flat(0.5)).item()
    assert decibels == pytest.approx(-20 * np.log10(0.1 * 219 / 255), abs=1e-4)


def test_psnr_of_equal_images_is_infinite() -> None:
    assert psnr_y(flat(0.5), flat(0.5)).item() == float("inf")


def test_border_is_left_out() -> None:
    result, reference = pictures()[1].clone(), pictures()[1]
    result[:, :, :4] = 0
    result[:, :, :, -4:] = 0
    assert psnr_y(result, reference, border=4).tolist() == [float("inf")] * 2
    assert ssim(result, reference, border=4).tolist() == pytest.approx([1, 1])
    assert psnr_y(result, reference, border=3).max() < 40


def test_ssim_equals_an_independent_computation() -> None:
    result, reference = pictures()
    x, y = (luma(image)[1, 0].numpy() for image in (result, reference))

    def mean(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=3.4)[5:-5, 5:-5]  # radius 5: 11 pixels

    c1, c2 = 0.01**2, 0.03**2
    product = (2 * mean(x) * mean(y) + c1) * (2 * (mean(x * y) - mean(x) * mean(y)) + c2)
    squares = (mean(x) ** 2 + mean(y) ** 2 + c1) * (mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2 + c2)
    assert ssim(result, reference)[1].item() == pytest.approx((product / squares).mean(), abs=1e-9)


def test_ssim_of_flat_images_compares_their_means() -> None:
    a, b = luma(flat(0.2))[0, 0, 0, 0].item(), luma(flat(0.7))[0, 0, 0, 0].item()
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(flat(0.2), flat(0.7)).item() == pytest.approx(expected, abs=1e-9)


def test_every_measure_prefers_less_noise(alex: LPIPS) -> None:
    noisy, clean = pictures()
    reference = Reference(clean[:1], [alex])
    little, much = (reference.score(noisy[i : i + 1]) for i in range(2))
    assert little.psnr_y > much.psnr_y + 6
    assert little.ssim > much.ssim
    assert little.lpips["alex"] < much.lpips["alex"]


def test_scores_are_those_of_the_single_measures(alex: LPIPS) -> None:
    result, reference = (images[1:] for images in pictures())
    scores = Reference(reference, [alex], border=2).score(result.requires_grad_())
    assert scores.psnr_y == pytest.approx(psnr_y(result, reference, 2).item())
    assert scores.ssim == pytest.approx(ssim(result, reference, 2).item())
    assert scores.lpips == {"alex": pytest.approx(alex(2 * result - 1, 2 * reference - 1).item())}


@pytest.mark.parametrize("measured", [psnr_y, ssim])
def test_wrong_images_are_refused(measured: type) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\).*\(1, 3, 16, 15\)"):
        measured(flat(0), flat(0)[..., :15])
    with pytest.raises(ValueError, match="two equal"):
        measured(flat(0)[:, :1], flat(0)[:, :1])
    with pytest.raises(ValueError, match=r"border is 8; .* 0\.\.7"):
        measured(flat(0), flat(0), border=8)
    with pytest.raises(ValueError, match=r"border is -1"):
        measured(flat(0), flat(0), border=-1)


def test_ssim_refuses_what_its_window_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sides from 11"):
        ssim(flat(0), flat(0), border=3)
