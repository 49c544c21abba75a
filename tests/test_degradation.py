from __future__ import annotations

import dataclasses
import io
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, ndimage, special, stats

from training.degradation import FULL, LIGHT, DegradationConfig, apply, degrade, degrade_pair, draw_parameters
from training.degradation.apply import add_noise, blur, compress_jpeg, to_bytes
from training.degradation.kernels import build_kernel
from training.degradation.parameters import KernelParameters, NoiseParameters
from training.degradation.resize import resize


def synthetic_photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft blobs, hard edges and some texture: float32 (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(rng.random((height, width, 3)), (6, 6, 0), mode="wrap")
    soft = (soft - soft.min()) / max(np.ptp(soft), 1e-6)
    edges = 0.3 * (soft[:, :, :1] > 0.5)
    texture = 0.05 * ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (1, 1, 0))
    return np.clip(0.6 * soft + edges + texture, 0, 1).astype(np.float32)


def grid(size: int) -> np.ndarray:
    axis = np.arange(size) - size // 2
    return np.stack(np.meshgrid(axis, axis), axis=-1).astype(float)


def covariance(sigma_x: float, sigma_y: float, rotation: float) -> np.ndarray:
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    return turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T


# Kernels


@pytest.mark.parametrize(("family", "rotation", "sigmas"), [("iso", 0.0, (1.3, 1.3)), ("aniso", 0.7, (2.4, 0.6))])
def test_gaussian_kernel_is_the_normal_density(family: str, rotation: float, sigmas: tuple[float, float]) -> None:
    parameters = KernelParameters(family=family, size=15, sigma_x=sigmas[0], sigma_y=sigmas[1], rotation=rotation)
    spread: Any = covariance(*sigmas, rotation)  # scipy's stubs admit numbers only
    density = stats.multivariate_normal.pdf(grid(15), np.zeros(2), spread)
    np.testing.assert_allclose(build_kernel(parameters), density / density.sum(), atol=1e-7)


@pytest.mark.parametrize("family", ["generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"])
def test_generalised_and_plateau_kernels(family: str) -> None:
    sigma_x, sigma_y, rotation, beta = 1.7, 0.9, -1.1, 1.6
    parameters = KernelParameters(family=family, size=9, sigma_x=sigma_x, sigma_y=sigma_y, rotation=rotation, beta=beta)
    points = grid(9)
    inverse = np.linalg.inv(covariance(sigma_x, sigma_y, rotation))
    distance = np.einsum("hwi,ij,hwj->hw", points, inverse, points)
    expected = np.exp(-0.5 * distance**beta) if "generalized" in family else 1 / (1 + distance**beta)
    np.testing.assert_allclose(build_kernel(parameters), expected / expected.sum(), atol=1e-7)


@pytest.mark.parametrize(("size", "cutoff"), [(7, pi / 3), (21, pi / 5), (13, 3.0)])
def test_sinc_kernel_is_the_transform_of_a_disk(size: int, cutoff: float) -> None:
    def ideal(radius: float) -> float:
        return integrate.quad(lambda w: w * special.j0(w * radius) / (2 * pi), 0, cutoff, limit=200)[0]

    expected = np.array([[ideal(float(np.hypot(*point))) for point in row] for row in grid(size)])
    kernel = build_kernel(KernelParameters(family="sinc", size=size, cutoff=cutoff))
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-6)


def test_blur_filters_each_channel_with_reflected_borders() -> None:
    image = synthetic_photograph(24, 17)
    parameters = KernelParameters(family="aniso", size=21, sigma_x=3.0, sigma_y=1.0, rotation=0.4)
    kernel = build_kernel(parameters)
    expected = np.dstack([ndimage.correlate(image[:, :, c], kernel, mode="mirror") for c in range(3)])
    np.testing.assert_allclose(blur(image, parameters), expected, atol=2e-6)


# Resize


@pytest.mark.parametrize("antialias", [False, True])
def test_area_is_the_mean_of_blocks(antialias: bool) -> None:
    image = synthetic_photograph(24, 32)
    blocks = image.reshape(6, 4, 8, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resize(image, 6, 8, "area", antialias), blocks, atol=1e-6)


@pytest.mark.parametrize("size", [(10, 13), (61, 50)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_equals_that_of_torch(size: tuple[int, int], mode: str, antialias: bool) -> None:
    image = synthetic_photograph(41, 37)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, size, mode=mode, antialias=antialias)
    result = resize(image, *size, mode, antialias)
    np.testing.assert_allclose(result, expected[0].permute(1, 2, 0).numpy(), atol=2e-5)


# Noise


def test_gaussian_noise_has_the_drawn_sigma() -> None:
    image = np.full((200, 200, 3), 0.5, dtype=np.float32)
    noise = add_noise(image, NoiseParameters(kind="gaussian", strength=12, gray=False), np.random.default_rng(0))
    assert (noise - image).std() * 255 == pytest.approx(12, rel=0.02)
    assert abs(np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_gray_noise_is_equal_in_all_channels(kind: str) -> None:
    image = 0.25 + 0.5 * synthetic_photograph(32, 32)
    strength = 5.0 if kind == "gaussian" else 0.5
    noise = add_noise(image, NoiseParameters(kind=kind, strength=strength, gray=True), np.random.default_rng(0)) - image
    assert noise.std() > 0.005
    np.testing.assert_allclose(noise[:, :, 0], noise[:, :, 2], atol=1e-6)


def test_poisson_noise_has_the_variance_of_photons() -> None:
    ramp = np.tile(np.arange(256, dtype=np.float32)[None, :, None] / 255, (2000, 1, 3))
    parameters = NoiseParameters(kind="poisson", strength=0.5, gray=False)
    noise = add_noise(ramp, parameters, np.random.default_rng(0)) - ramp
    middle = slice(64, 192)  # away from the clamp; 256 different values: 256 photons at 1
    expected = 0.5**2 * (np.arange(256) / 255 / 256)
    np.testing.assert_allclose(noise.var(axis=(0, 2))[middle], expected[middle], rtol=0.1)
    assert np.abs(noise.mean(axis=(0, 2))[middle]).max() < 2e-3


def test_noise_is_clamped() -> None:
    image = synthetic_photograph(64, 64)
    noisy = add_noise(image, NoiseParameters(kind="gaussian", strength=200, gray=False), np.random.default_rng(0))
    assert noisy.min() == 0
    assert noisy.max() == 1


# JPEG


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_equals_that_of_pillow_at_the_same_quality(quality: int) -> None:
    image = synthetic_photograph(64, 80)
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    difference = np.abs(compress_jpeg(image, quality) - expected) * 255
    assert difference.mean() < 0.3, "another quality scale, chroma subsampling or channel order?"


def test_jpeg_none_changes_nothing_and_lower_quality_changes_more() -> None:
    image = synthetic_photograph(64, 64)
    assert compress_jpeg(image, None) is image
    errors = [np.abs(compress_jpeg(image, quality) - image).mean() for quality in (95, 75, 50, 30)]
    assert errors == sorted(errors)


def test_bytes_are_clamped_and_rounded() -> None:
    levels = np.array([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 2.0], dtype=np.float32)
    assert to_bytes(levels).tolist() == [0, 0, 0, 1, 255, 255, 255]


# The whole


@pytest.mark.parametrize("config", [FULL, LIGHT], ids=["full", "light"])
@pytest.mark.parametrize("size", [(4, 4), (8, 128), (60, 100), (128, 128)])
def test_result_is_four_times_smaller_and_8_bit(config: DegradationConfig, size: tuple[int, int]) -> None:
    hq = synthetic_photograph(*size)
    for seed in range(12):
        lq = degrade(hq, np.random.default_rng(seed), config)
        assert lq.shape == (size[0] // 4, size[1] // 4, 3)
        assert lq.dtype == np.uint8


@pytest.mark.parametrize("config", [FULL, LIGHT], ids=["full", "light"])
def test_same_seed_gives_the_same_image(config: DegradationConfig) -> None:
    hq = synthetic_photograph(64, 96)
    before = hq.copy()
    first, second, other = (degrade(hq, np.random.default_rng(seed), config) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    np.testing.assert_array_equal(hq, before, err_msg="the photograph was changed in place")


def test_degrade_is_draw_and_apply() -> None:
    hq = synthetic_photograph(64, 64)
    rng = np.random.default_rng(3)
    step_by_step = apply(hq, draw_parameters(rng, FULL), rng)
    np.testing.assert_array_equal(step_by_step, degrade(hq, np.random.default_rng(3)))


def test_orders_of_jpeg_and_resize_differ() -> None:
    hq = synthetic_photograph(128, 128)
    drawn = draw_parameters(np.random.default_rng(11))
    results = [
        apply(hq, dataclasses.replace(drawn, jpeg_before_resize=before), np.random.default_rng(0))
        for before in (False, True)
    ]
    assert (results[0] != results[1]).any()


def test_brightness_and_colour_stay() -> None:
    hq = 0.2 + 0.6 * synthetic_photograph(128, 128)
    means = [degrade(hq, np.random.default_rng(seed)).mean(axis=(0, 1)) / 255 for seed in range(60)]
    np.testing.assert_allclose(np.mean(means, axis=0), hq.mean(axis=(0, 1)), atol=0.01)


def test_light_preset_is_closer_to_a_clean_downscale_than_full() -> None:
    def mean_psnr(config: DegradationConfig) -> float:
        psnrs = []
        for seed in range(30):
            hq = synthetic_photograph(128, 128, seed)
            clean = hq.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
            lq = degrade(hq, np.random.default_rng(seed), config) / 255
            psnrs.append(-10 * np.log10(np.mean((lq - clean) ** 2)))
        return float(np.mean(psnrs))

    assert mean_psnr(LIGHT) > mean_psnr(FULL) + 6


def test_pair_flips_both_images() -> None:
    crop = to_bytes(synthetic_photograph(64, 64))
    always = dataclasses.replace(FULL, flip_probability=1.0)
    pair = degrade_pair(crop, np.random.default_rng(2), always)
    np.testing.assert_array_equal(to_bytes(pair.hq), crop[:, ::-1])
    rng = np.random.default_rng(2)
    rng.random()  # the draw of the flip
    np.testing.assert_array_equal(pair.lq, degrade(pair.hq, rng, always))
    never = dataclasses.replace(FULL, flip_probability=0.0)
    np.testing.assert_array_equal(to_bytes(degrade_pair(crop, np.random.default_rng(2), never).hq), crop)


def test_pair_flips_half_of_the_time() -> None:
    crop = np.zeros((8, 8, 3), dtype=np.uint8)
    crop[:, :4] = 255
    flipped = [bool(degrade_pair(crop, np.random.default_rng(s), LIGHT).hq[0, 0, 0] == 0) for s in range(200)]
    assert 80 <= sum(flipped) <= 120


@pytest.mark.parametrize(
    ("photograph", "message"),
    [
        (np.zeros((8, 8), np.float32), r"\(8, 8\)"),
        (np.zeros((8, 8, 4), np.float32), r"\(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), "uint8"),
        (np.zeros((8, 10, 3), np.float32), "8x10"),
        (np.zeros((0, 8, 3), np.float32), "0x8"),
        (np.full((8, 8, 3), 255, np.float32), "255"),
        (np.full((8, 8, 3), np.nan, np.float32), "nan"),
    ],
)
def test_wrong_photographs_are_refused(photograph: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(photograph, np.random.default_rng(0))
