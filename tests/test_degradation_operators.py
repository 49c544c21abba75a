"""Each operator of the degradation against an independent computation by scipy, Pillow, torch or numpy."""

from __future__ import annotations

import io
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, integrate, ndimage, special, stats
from synthetic_photograph import synthetic_photograph

from training.degradation import FULL
from training.degradation.apply import add_noise, blur, compress_jpeg, to_bytes
from training.degradation.kernels import build_kernel
from training.degradation.parameters import KernelParameters, NoiseParameters, draw_kernel
from training.degradation.resize import resize

GRAY = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601
LEAST_P = 5e-3  # with fixed seeds: a failure means another distribution, not bad luck
LUMA_STEPS = np.array(  # ITU-T T.81, table K.1
    [
        *([16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55]),
        *([14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62]),
        *([18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92]),
        *([49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]),
    ]
)
KERNELS = {
    "iso": KernelParameters(family="iso", size=15, sigma_x=1.3, sigma_y=1.3),
    "aniso": KernelParameters(family="aniso", size=21, sigma_x=3.0, sigma_y=1.0, rotation=0.4),
    "generalized_iso": KernelParameters(family="generalized_iso", size=9, sigma_x=2.0, sigma_y=2.0, beta=0.5),
    "generalized_aniso": KernelParameters(
        family="generalized_aniso", size=11, sigma_x=0.9, sigma_y=2.5, rotation=-2.0, beta=4.0
    ),
    "plateau_iso": KernelParameters(family="plateau_iso", size=7, sigma_x=0.6, sigma_y=0.6, beta=1.0),
    "plateau_aniso": KernelParameters(
        family="plateau_aniso", size=13, sigma_x=1.7, sigma_y=0.9, rotation=1.1, beta=2.0
    ),
    "sinc": KernelParameters(family="sinc", size=21, cutoff=pi / 4),
}


def grid(size: int) -> np.ndarray:
    axis = np.arange(size) - size // 2
    return np.stack(np.meshgrid(axis, axis), axis=-1).astype(float)


def covariance(parameters: KernelParameters) -> Any:  # scipy's stubs admit numbers only
    cosine, sine = np.cos(parameters.rotation), np.sin(parameters.rotation)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return turn @ np.diag([parameters.sigma_x**2, parameters.sigma_y**2]) @ turn.T


def expected_kernel(parameters: KernelParameters) -> np.ndarray:
    """Returns the kernel by its definition, float64, sum 1."""
    points = grid(parameters.size)
    if parameters.family == "sinc":
        kernel = np.array([[disk_transform(np.hypot(*point), parameters.cutoff) for point in row] for row in points])
    elif parameters.family in ("iso", "aniso"):
        kernel = stats.multivariate_normal.pdf(points, np.zeros(2), covariance(parameters))
    else:
        distance = np.einsum("hwi,ij,hwj->hw", points, np.linalg.inv(covariance(parameters)), points)
        power = distance**parameters.beta
        kernel = 1 / (1 + power) if parameters.family.startswith("plateau") else np.exp(-0.5 * power)
    return kernel / kernel.sum()


def disk_transform(radius: float, cutoff: float) -> float:
    """Returns the inverse Fourier transform of a disk of radius `cutoff`, at `radius` pixels."""
    return integrate.quad(lambda w: w * special.j0(w * radius) / (2 * pi), 0, cutoff, limit=200)[0]


# Kernels


@pytest.mark.parametrize("family", KERNELS)
def test_kernel_is_that_of_its_definition(family: str) -> None:
    np.testing.assert_allclose(build_kernel(KERNELS[family]), expected_kernel(KERNELS[family]), atol=1e-6)


@pytest.mark.parametrize(("size", "cutoff"), [(7, pi / 3), (21, pi / 5), (13, 3.0)])
def test_sinc_kernel_is_the_transform_of_a_disk(size: int, cutoff: float) -> None:
    parameters = KernelParameters(family="sinc", size=size, cutoff=cutoff)
    np.testing.assert_allclose(build_kernel(parameters), expected_kernel(parameters), atol=1e-6)


def test_drawn_kernels_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_kernel(rng, FULL.second.blur) for _ in range(120)]
    drawn = [parameters for parameters in drawn if parameters.family != "sinc"]  # compared above, slowly
    assert {parameters.family for parameters in drawn} == set(KERNELS) - {"sinc"}
    for parameters in drawn:
        np.testing.assert_allclose(
            build_kernel(parameters), expected_kernel(parameters), atol=1e-6, err_msg=str(parameters)
        )


@pytest.mark.parametrize("family", KERNELS)
def test_blur_filters_each_channel_with_reflected_borders(family: str) -> None:
    image = synthetic_photograph(24, 17)
    kernel = expected_kernel(KERNELS[family])
    expected = np.dstack([ndimage.correlate(image[:, :, c].astype(float), kernel, mode="mirror") for c in range(3)])
    np.testing.assert_allclose(blur(image, KERNELS[family]), expected, atol=5e-6)


# Resize


def coverage(size: int, target: int) -> np.ndarray:
    """Returns the share of each of `size` pixels in each of `target` pixels: (target, size), by counting."""
    parts = np.repeat(np.eye(size), target, axis=1)  # each old pixel in `target` parts: `size` of them in each new one
    return parts.reshape(size, target, size).mean(axis=2).T


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (10, 13), (23, 31), (24, 40), (37, 61), (1, 1)])
def test_area_is_the_mean_of_the_pixels_covered(size: tuple[int, int], antialias: bool) -> None:
    image = synthetic_photograph(24, 32)
    expected = np.einsum("ij,jkc,lk->ilc", coverage(24, size[0]), image, coverage(32, size[1]))
    np.testing.assert_allclose(resize(image, *size, "area", antialias), expected, atol=1e-5)


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


def noise_of(image: np.ndarray, kind: str, strength: float, gray: bool) -> np.ndarray:
    parameters = NoiseParameters(kind=kind, strength=strength, gray=gray)
    return add_noise(image, parameters, np.random.default_rng(0)) - image


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_is_normal_with_the_drawn_sigma(gray: bool) -> None:
    noise = noise_of(np.full((120, 120, 3), 0.5, dtype=np.float32), "gaussian", 12, gray) * 255
    for channel in range(3):
        p = stats.kstest(noise[:, :, channel].ravel(), stats.norm(0, 12).cdf).pvalue
        assert p > LEAST_P, f"channel {channel}: not normal with sigma 12, p {p:.2g}"
    correlation = np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]
    assert correlation == pytest.approx(1.0 if gray else 0.0, abs=0.03)


def test_gaussian_noise_is_independent_between_pixels() -> None:
    noise = noise_of(np.full((200, 200, 3), 0.5, dtype=np.float32), "gaussian", 12, False)
    for step in ((0, 1), (1, 0), (1, 1)):
        shifted = np.roll(noise, step, axis=(0, 1))
        assert abs(np.corrcoef(noise.ravel(), shifted.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_gray_noise_is_equal_in_all_channels(kind: str) -> None:
    noise = noise_of(0.25 + 0.5 * synthetic_photograph(32, 32), kind, 5.0 if kind == "gaussian" else 0.5, True)
    assert noise.std() > 0.005
    np.testing.assert_allclose(noise[:, :, 0], noise[:, :, 2], atol=1e-6)


def test_poisson_noise_has_the_variance_of_photons() -> None:
    ramp = np.tile(np.arange(256, dtype=np.float32)[None, :, None] / 255, (2000, 1, 3))
    noise = noise_of(ramp, "poisson", 0.5, False)
    middle = slice(64, 192)  # away from the clamp; 256 different values: 256 photons at 1
    expected = 0.5**2 * (np.arange(256) / 255 / 256)
    np.testing.assert_allclose(noise.var(axis=(0, 2))[middle], expected[middle], rtol=0.1)
    assert np.abs(noise.mean(axis=(0, 2))[middle]).max() < 2e-3


@pytest.mark.parametrize(("different", "photons"), [(2, 2), (5, 8), (8, 8), (9, 16)])
def test_poisson_counts_photons_up_to_the_power_of_two_above_the_levels(different: int, photons: int) -> None:
    """In a picture of few levels the noise is a Poisson variable of scipy's, on a grid of 1 / photons."""
    values = np.linspace(0, 51, different).round().astype(np.float32) / 255  # up to 0.2: next to nothing is clamped
    image = np.tile(values.repeat(4000 // different)[:, None, None], (1, 9, 3))
    noise = noise_of(image, "poisson", 0.25, False)
    brightest = image[:, :, 0] == values[-1]
    counts = ((noise[brightest] / 0.25 + values[-1]) * photons).ravel()
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3, err_msg="not on the grid of 1 / photons")
    seen = np.bincount(counts.round().astype(int), minlength=6)
    chances = stats.poisson(float(values[-1]) * photons).pmf(np.arange(5))
    observed = np.append(seen[:5], seen[5:].sum())
    p = stats.chisquare(observed, np.append(chances, 1 - chances.sum()) * observed.sum()).pvalue
    assert p > LEAST_P, f"counts {observed} are not Poisson, p {p:.2g}"


def test_gray_poisson_noise_is_that_of_the_luma() -> None:
    ramp = np.arange(64, 192, dtype=np.float32) / 255
    image = np.tile(np.stack((ramp, 0.5 * ramp, 0.25 * ramp), axis=-1)[None], (4000, 1, 1))
    luma = to_bytes(image[0] @ GRAY)  # 77 different values: 128 photons
    noise = noise_of(image, "poisson", 0.5, True)
    np.testing.assert_allclose(noise[:, :, 0].var(axis=0), 0.5**2 * luma / 255 / 128, rtol=0.15)


def test_noise_is_clamped() -> None:
    image = synthetic_photograph(64, 64)
    noisy = image + noise_of(image, "gaussian", 200, False)
    assert noisy.min() == pytest.approx(0, abs=1e-6)
    assert noisy.max() == pytest.approx(1, abs=1e-6)


# JPEG


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_equals_that_of_pillow_at_the_same_quality(quality: int) -> None:
    image = synthetic_photograph(64, 80)
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    difference = np.abs(compress_jpeg(image, quality) - expected) * 255
    assert difference.mean() < 0.3, "another quality scale, chroma subsampling or channel order?"


def quantised_cosines(levels: np.ndarray, quality: int) -> np.ndarray:
    """Returns what JPEG of `quality` makes of a gray picture, uint8 (64, 80), by the exact transform: in 0..255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = np.clip((LUMA_STEPS * scale + 50) // 100, 1, 255)
    blocks = levels.reshape(8, 8, 10, 8).swapaxes(1, 2) - 128.0
    coefficients = np.asarray(fft.dctn(blocks, axes=(2, 3), norm="ortho"))
    decoded = np.asarray(fft.idctn(np.round(coefficients / steps) * steps, axes=(2, 3), norm="ortho"))
    return np.clip(np.round(decoded.swapaxes(1, 2).reshape(64, 80) + 128), 0, 255)


@pytest.mark.parametrize("quality", [30, 48, 50, 75, 93])
def test_jpeg_of_gray_pictures_is_the_quantised_cosine_transform(quality: int) -> None:
    levels = to_bytes(synthetic_photograph(64, 80)[:, :, 1])
    result = compress_jpeg(np.dstack([levels] * 3).astype(np.float32) / 255, quality)[:, :, 1] * 255
    errors = {
        other: np.abs(result - quantised_cosines(levels, other)).mean() for other in range(quality - 2, quality + 3)
    }
    # libjpeg's transform is one of rounded integers, so halves (plain blocks have many) go either way.
    assert errors[quality] < 0.5, "other quantisation tables?"
    assert errors[quality] < 0.6 * min(error for other, error in errors.items() if other != quality), errors


def test_jpeg_none_changes_nothing_and_lower_quality_changes_more() -> None:
    image = synthetic_photograph(64, 64)
    assert compress_jpeg(image, None) is image
    errors = [np.abs(compress_jpeg(image, quality) - image).mean() for quality in (95, 75, 50, 30)]
    assert errors == sorted(errors)


def test_bytes_are_clamped_and_rounded() -> None:
    levels = np.array([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 2.0], dtype=np.float32)
    assert to_bytes(levels).tolist() == [0, 0, 0, 1, 255, 255, 255]
