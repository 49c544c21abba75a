"""The degradation in torch against that of numpy and OpenCV, on the CPU and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
from math import pi

import numpy as np
import pytest
import torch
from scipy import stats
from synthetic_photograph import synthetic_photograph
from torch import Tensor

from training.degradation import (
    FULL,
    LIGHT,
    DegradationConfig,
    DegradationParameters,
    apply,
    degrade_batch,
    draw_parameters,
    torch_jpeg,
    torch_operators,
)
from training.degradation.apply import add_noise, blur, compress_jpeg, to_bytes
from training.degradation.parameters import KernelParameters, NoiseParameters
from training.degradation.resize import resize

LEAST_P = 5e-3  # with fixed seeds
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KERNELS = [
    KernelParameters(family="aniso", size=21, sigma_x=3.0, sigma_y=1.0, rotation=0.4),
    KernelParameters(family="plateau_iso", size=7, sigma_x=0.6, sigma_y=0.6, beta=1.0),
    KernelParameters(family="sinc", size=13, cutoff=pi / 4),
]


def to_tensor(image: np.ndarray, device: str = "cpu") -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(device)


def to_array(image: Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).cpu().numpy()


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(40, 53), (5, 8), (1, 3)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.family)
def test_blur_equals_that_of_opencv(kernel: KernelParameters, size: tuple[int, int], device: str) -> None:
    image = synthetic_photograph(*size)
    result = torch_operators.blur(to_tensor(image, device), kernel)
    np.testing.assert_allclose(to_array(result), blur(image, kernel), atol=5e-6 if device == "cpu" else 2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(6, 8), (10, 13), (23, 31), (37, 61), (48, 64), (1, 1), (24, 32)])
@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_equals_that_of_opencv(size: tuple[int, int], mode: str, antialias: bool, device: str) -> None:
    image = synthetic_photograph(24, 32)
    result = to_array(torch_operators.resize(to_tensor(image, device), *size, mode, antialias))
    np.testing.assert_allclose(result, resize(image, *size, mode, antialias), atol=2e-5)


def test_area_that_shrinks_one_side_and_enlarges_the_other_is_near_that_of_opencv() -> None:
    image = synthetic_photograph(100, 99)
    result = to_array(torch_operators.resize(to_tensor(image), 99, 100, "area"))
    np.testing.assert_allclose(result, resize(image, 99, 100, "area"), atol=0.01)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_is_normal_with_the_drawn_sigma(gray: bool, device: str) -> None:
    image = torch.full((1, 3, 120, 120), 0.5, device=device)
    parameters = NoiseParameters(kind="gaussian", strength=12, gray=gray)
    noise = (torch_operators.add_noise(image, parameters, generator(device)) - image)[0].cpu().numpy() * 255
    for channel in noise:
        p = stats.kstest(channel.ravel(), stats.norm(0, 12).cdf).pvalue
        assert p > LEAST_P, f"not normal with sigma 12, p {p:.2g}"
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] == pytest.approx(1.0 if gray else 0.0, abs=0.03)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("different", [2, 5, 8, 9, 100])
def test_poisson_noise_has_the_distribution_of_numpys(different: int, gray: bool, device: str) -> None:
    values = (np.linspace(0, 120, different).round() / 255).astype(np.float32)
    image = np.tile(values.repeat(6000 // different)[:, None, None] * np.array((1, 0.8, 0.6), np.float32), (1, 3, 1))
    parameters = NoiseParameters(kind="poisson", strength=0.25, gray=gray)
    result = to_array(torch_operators.add_noise(to_tensor(image, device), parameters, generator(device))) - image
    expected = add_noise(image, parameters, np.random.default_rng(1)) - image
    for level in (1, different // 2, different - 1):
        rows = image[:, 0, 0] == values[level]
        # Rounded, so that the grid of 1 / photons is the same in both and ties are ties.
        p = stats.ks_2samp(*(noise[rows][:, :, 0].ravel().round(4) for noise in (result, expected))).pvalue
        assert p > LEAST_P, f"level {level} of {different}: another distribution, p {p:.2g}"
        assert result[rows].std() == pytest.approx(expected[rows].std(), rel=0.15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quality", [10, 30, 49, 60, 80, 95, 100])
@pytest.mark.parametrize("size", [(64, 80), (61, 75), (5, 7), (1, 1)])
def test_jpeg_equals_that_of_opencv_but_for_single_levels(size: tuple[int, int], quality: int, device: str) -> None:
    """Measured on photographs: mean difference 0.01 levels of 255 at quality 30 and 60, 0.02 at 95."""
    image = synthetic_photograph(*size)
    result = to_array(torch_jpeg.compress_jpeg(to_tensor(image, device), quality))
    difference = np.abs(result - compress_jpeg(image, quality)) * 255
    assert difference.mean() < 0.05, f"mean {difference.mean():.3f}, largest {difference.max():.0f}, of 255"


def test_jpeg_none_changes_nothing() -> None:
    image = to_tensor(synthetic_photograph(16, 16))
    assert torch_jpeg.compress_jpeg(image, None) is image


def test_levels_round_as_those_of_numpy() -> None:
    values = np.linspace(-0.1, 1.1, 100_001, dtype=np.float32)
    np.testing.assert_array_equal(torch_jpeg.to_levels(torch.from_numpy(values)).numpy(), to_bytes(values))


def without_noise(drawn: DegradationParameters) -> DegradationParameters:
    silent = NoiseParameters(kind="gaussian", strength=0.0, gray=False)
    first = None if drawn.first is None else dataclasses.replace(drawn.first, noise=silent)
    return dataclasses.replace(drawn, first=first, second=dataclasses.replace(drawn.second, noise=silent))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [FULL, LIGHT], ids=["full", "light"])
def test_whole_without_noise_equals_the_numpy_path(config: DegradationConfig, device: str) -> None:
    photographs = [synthetic_photograph(96, 128, seed) for seed in range(12)]
    parameters = [without_noise(draw_parameters(np.random.default_rng(seed), config)) for seed in range(12)]
    hq = torch.cat([to_tensor(photograph, device) for photograph in photographs])
    result = degrade_batch(hq, parameters, range(12))
    assert result.shape == (12, 3, 24, 32)
    assert result.device == hq.device
    expected = [apply(hq, drawn, np.random.default_rng(0)) for hq, drawn in zip(photographs, parameters, strict=True)]
    difference = np.abs(result.permute(0, 2, 3, 1).cpu().numpy() * 255 - np.stack(expected)).mean(axis=(1, 2, 3))
    # A block of JPEG that rounds to another level moves a whole picture as small as this a little.
    worst = int(difference.argmax())
    assert difference[worst] < 0.6, f"mean difference {difference[worst]:.2f} of 255, {parameters[worst]}"
    assert difference.mean() < 0.1, f"mean differences {difference} of 255"


@pytest.mark.parametrize("device", DEVICES)
def test_whole_with_noise_has_the_mean_and_spread_of_the_numpy_path(device: str) -> None:
    photograph = synthetic_photograph(64, 64)
    for seed in range(4):
        drawn = draw_parameters(np.random.default_rng(seed))
        batch = to_tensor(photograph, device).expand(16, -1, -1, -1)
        result = degrade_batch(batch, [drawn] * 16, range(16)).permute(0, 2, 3, 1).cpu().numpy()
        expected = np.stack([apply(photograph, drawn, np.random.default_rng(noise)) for noise in range(16)]) / 255
        assert result.mean() == pytest.approx(expected.mean(), abs=0.01), drawn
        assert result.std(axis=0).mean() == pytest.approx(expected.std(axis=0).mean(), rel=0.1), drawn


def test_photographs_of_a_batch_do_not_depend_on_each_other() -> None:
    hq = torch.cat([to_tensor(synthetic_photograph(32, 48, seed)) for seed in range(4)])
    before = hq.clone()
    parameters = [draw_parameters(np.random.default_rng(seed)) for seed in range(4)]
    together = degrade_batch(hq, parameters, [10, 11, 12, 13])
    torch.testing.assert_close(hq, before, rtol=0, atol=0, msg="the photographs were changed in place")
    alone = [degrade_batch(hq[i : i + 1], parameters[i : i + 1], [10 + i]) for i in (2, 0, 3, 1)]
    torch.testing.assert_close(together[[2, 0, 3, 1]], torch.cat(alone), rtol=0, atol=0)
    assert (degrade_batch(hq, parameters, [0, 1, 2, 3]) != together).any()
    levels = together * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_the_global_random_state_stays() -> None:
    state = torch.get_rng_state()
    degrade_batch(
        torch.rand(1, 3, 16, 16, generator=generator("cpu")), [draw_parameters(np.random.default_rng(0))], [0]
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_changes_nothing() -> None:
    hq, drawn = to_tensor(synthetic_photograph(32, 32)), draw_parameters(np.random.default_rng(0))
    expected = degrade_batch(hq, [drawn], [0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(degrade_batch(hq, [drawn], [0]), expected, rtol=0, atol=0)


DRAWN = draw_parameters(np.random.default_rng(0))
HALVED = draw_parameters(np.random.default_rng(0), DegradationConfig(downscale=2))


@pytest.mark.parametrize(
    ("hq", "parameters", "seeds", "message"),
    [
        (torch.zeros(3, 8, 8), [DRAWN], [0], r"\(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), [DRAWN], [0], r"\(1, 4, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), [], [], "not empty"),
        (torch.zeros(1, 3, 8, 8).half(), [DRAWN], [0], "float16"),
        (torch.zeros(2, 3, 8, 8), [DRAWN], [0, 1], "2 photographs, 1 parameters"),
        (torch.zeros(1, 3, 8, 8), [DRAWN], [], "0 seeds"),
        (torch.zeros(1, 3, 8, 10), [DRAWN], [0], "8x10"),
        (torch.zeros(2, 3, 8, 8), [DRAWN, HALVED], [0, 1], r"\[2, 4\]"),
        (torch.full((1, 3, 8, 8), 2.0), [DRAWN], [0], "2.0"),
        (torch.full((1, 3, 8, 8), float("nan")), [DRAWN], [0], "nan"),
    ],
)
def test_wrong_batches_are_refused(
    hq: Tensor, parameters: list[DegradationParameters], seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        degrade_batch(hq, parameters, seeds)
