"""The degradation as a whole: shapes, seeds, order of the steps, pairs, errors."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from synthetic_photograph import synthetic_photograph

from training.degradation import FULL, LIGHT, DegradationConfig, apply, degrade, draw_parameters
from training.degradation.config import ResizeConfig
from training.degradation.kernels import build_kernel
from training.degradation.parameters import DegradationParameters, KernelParameters, StageParameters


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


def independent_degradation(hq: np.ndarray, drawn: DegradationParameters) -> np.ndarray:
    """Returns float (H/4, W/4, 3) in 0..255 of the documented steps without noise, by scipy, torch and Pillow."""
    assert drawn.first is not None
    height, width = hq.shape[0] // 4, hq.shape[1] // 4

    def filtered(image: np.ndarray, kernel: KernelParameters | None) -> np.ndarray:
        if kernel is None:
            return image
        weights = build_kernel(kernel)
        return np.dstack([ndimage.correlate(image[:, :, channel], weights, mode="mirror") for channel in range(3)])

    def resized(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(tensor, size, mode=mode)[0].permute(1, 2, 0).numpy()

    def compressed(image: np.ndarray, quality: int | None) -> np.ndarray:
        buffer = io.BytesIO()
        levels = np.clip(np.round(image * 255), 0, 255).astype(np.uint8)
        Image.fromarray(levels).save(buffer, "JPEG", quality=quality or 100, subsampling="4:2:0")
        return np.asarray(Image.open(buffer), dtype=np.float32) / 255

    def staged(image: np.ndarray, stage: StageParameters, size: tuple[int, int]) -> np.ndarray:
        size = int(size[0] * stage.resize.scale), int(size[1] * stage.resize.scale)
        return np.clip(resized(filtered(image, stage.kernel), size, stage.resize.mode), 0, 1)

    image = compressed(staged(hq, drawn.first, hq.shape[:2]), drawn.first_quality)
    image = staged(image, drawn.second, (height, width))
    if drawn.jpeg_before_resize:
        image = compressed(image, drawn.final_quality)
    image = filtered(resized(image, (height, width), drawn.final_mode), drawn.final_kernel)
    if not drawn.jpeg_before_resize:
        image = compressed(image, drawn.final_quality)
    return np.clip(np.round(image * 255), 0, 255)


def without_noise(stage: StageParameters) -> StageParameters:
    return dataclasses.replace(stage, noise=dataclasses.replace(stage.noise, kind="gaussian", strength=0.0))


@pytest.mark.parametrize("jpeg_before_resize", [False, True])
def test_steps_come_in_the_documented_order(jpeg_before_resize: bool) -> None:
    interpolated = ResizeConfig(modes=("bilinear", "bicubic"))  # torch has no other area than whole factors'
    first = dataclasses.replace(FULL.second, resize=interpolated)
    config = dataclasses.replace(FULL, first=first, second=first, final_modes=("bilinear", "bicubic"))
    hq = synthetic_photograph(96, 128)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        drawn = draw_parameters(rng, config)
        assert drawn.first is not None
        drawn = dataclasses.replace(
            drawn,
            first=without_noise(drawn.first),
            second=without_noise(drawn.second),
            jpeg_before_resize=jpeg_before_resize,
        )
        difference = np.abs(apply(hq, drawn, rng) - independent_degradation(hq, drawn))
        assert difference.mean() < 0.3, f"seed {seed}: mean difference {difference.mean():.2f} of 255, {drawn}"


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
