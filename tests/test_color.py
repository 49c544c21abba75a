"""Colour match against hand-made pictures and the recorded numbers of the official implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tadsr.color import (
    COLOR_MATCHES,
    colors,
    estimated_colors,
    is_neutral,
    lab_to_rgb,
    match_adain,
    match_colors,
    match_lab,
    match_wavelet,
    rgb_to_lab,
    to_neutral,
    wavelet_low,
)

RECORDED_SHAPES = ["20x24", "48x80", "64x64"]
TOLERANCE = 2e-6  # float32 rounding of values in [0, 1]


def _pictures(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    result = torch.rand(2, 3, 40, 33, generator=generator)
    reference = 0.3 + 0.2 * torch.rand(2, 3, 40, 33, generator=generator)
    return result, reference


@pytest.mark.parametrize("shape", RECORDED_SHAPES)
def test_equals_the_official_numbers(shape: str, shared_reference: Path) -> None:
    recorded = load_file(shared_reference / "colorfix.safetensors")
    source, target = recorded[f"{shape}.source"], recorded[f"{shape}.target"]
    # "target" is the picture whose colour is changed, "source" the one that gives the colour
    adain = match_adain(target, source)
    wavelet = match_wavelet(target, source)
    assert (adain - recorded[f"{shape}.adain"]).abs().max() < TOLERANCE
    assert (wavelet - recorded[f"{shape}.wavelet"]).abs().max() < TOLERANCE
    assert (wavelet_low(target) - recorded[f"{shape}.target_low"]).abs().max() < TOLERANCE


def test_adain_takes_over_mean_and_spread() -> None:
    result, reference = _pictures()
    matched = match_adain(result, reference)
    assert torch.allclose(matched.mean((-2, -1)), reference.mean((-2, -1)), atol=1e-5)
    assert torch.allclose(matched.std((-2, -1)), reference.std((-2, -1)), rtol=5e-3)  # the eps in the root


def test_adain_treats_each_image_alone() -> None:
    result, reference = _pictures()
    alone = match_adain(result[:1], reference[:1])
    assert torch.allclose(match_adain(result, reference)[:1], alone, atol=1e-6)


def test_wavelet_removes_a_colour_cast_and_keeps_detail() -> None:
    result, reference = _pictures()
    cast = torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1)
    assert torch.allclose(match_wavelet(result + cast, reference), match_wavelet(result, reference), atol=1e-5)
    matched = match_wavelet(result, reference)
    assert torch.allclose(matched - wavelet_low(reference), result - wavelet_low(result), atol=1e-6)


@pytest.mark.parametrize("method", sorted(COLOR_MATCHES))
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (40, 33)])
def test_every_size_is_finite_and_a_picture_matches_itself(method: str, size: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *size)
    flat = torch.full((1, 3, *size), 0.5)
    match = COLOR_MATCHES[method]
    assert torch.allclose(match(picture, picture), picture, atol=1e-5)
    assert match(flat, picture).isfinite().all()


# Published values of CIE Lab for sRGB primaries, D65 (Lindbloom's calculator)
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0), (53.24, 80.09, 67.20)),
        ((0.0, 1.0, 0.0), (87.73, -86.18, 83.18)),
        ((0.0, 0.0, 1.0), (32.30, 79.19, -107.86)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ],
)
def test_lab_of_the_primaries_and_back(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    colour = torch.tensor(rgb).view(1, 3, 1, 1)
    found = rgb_to_lab(colour) * 100
    assert torch.allclose(found.flatten(), torch.tensor(lab), atol=0.05)
    assert torch.allclose(lab_to_rgb(found / 100), colour, atol=1e-5)


def test_lab_takes_over_lightness_and_colour_without_mixing_them() -> None:
    result, reference = _pictures()
    matched = rgb_to_lab(match_lab(0.4 + 0.2 * result, reference))
    wanted = rgb_to_lab(reference)
    assert torch.allclose(matched.mean((-2, -1)), wanted.mean((-2, -1)), atol=5e-3)  # what leaves sRGB is clamped
    grey = to_neutral(reference)
    assert is_neutral(match_lab(to_neutral(result), grey)), "grey stays grey"


def test_neutral_pictures_are_recognised_and_made() -> None:
    picture, _ = _pictures()
    assert not is_neutral(picture)
    assert is_neutral(to_neutral(picture))
    assert torch.allclose(to_neutral(picture).mean(1), picture.mean(1))


def test_colours_of_a_whole_are_told_from_a_smaller_copy() -> None:
    _, reference = _pictures()
    reference = reference[:1]
    result = reference * 1.3 - 0.1
    small, small_reference = result[..., ::2, ::2], reference[..., ::2, ::2]
    told, true = estimated_colors(small, small_reference, colors(reference)), colors(result)
    assert torch.allclose(told.mean, true.mean, atol=5e-3) and torch.allclose(told.std, true.std, rtol=5e-3)
    plain = (colors(small).mean - true.mean).abs().max()
    assert (told.mean - true.mean).abs().max() < 0.5 * plain, "the copy's own error must cancel"
    assert torch.allclose(match_colors(result.clone(), true, colors(reference)), match_adain(result, reference))


@pytest.mark.parametrize("method", sorted(set(COLOR_MATCHES) - {"none"}))
def test_what_cannot_be_seen_does_not_count(method: str) -> None:
    result, reference = (picture[:1] for picture in _pictures())
    match, alpha = COLOR_MATCHES[method], torch.ones(1, 1, 40, 33)
    assert torch.allclose(match(result, reference, alpha), match(result, reference), atol=1e-5), "all can be seen"
    alpha[..., 20:, :], alpha[..., 10:20, :] = 0.0, 0.5
    expected = match(result, reference, alpha)
    hidden = torch.where(alpha == 0, 0.9, reference), torch.where(alpha == 0, 0.1, result)
    assert torch.allclose((match(hidden[1], hidden[0], alpha) - expected) * alpha, torch.zeros(1), atol=1e-6)
    assert match(result, reference, torch.zeros_like(alpha)).isfinite().all(), "nothing can be seen"


def test_colours_weighted_by_alpha_are_those_of_repeated_pixels() -> None:
    picture = torch.tensor([0.1, 0.4, 0.8]).view(1, 1, 1, 3)
    weighted = colors(picture, torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3))
    assert torch.allclose(weighted.mean, torch.tensor(0.25))
    assert torch.allclose(weighted.std**2, torch.tensor(0.045 + 1e-5)), "unbiased: (0.15^2 + 0.15^2) / (2 - 1)"


def test_hidden_colours_do_not_make_a_grey_picture_coloured() -> None:
    picture, alpha = torch.full((1, 3, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    picture[0, 0, 0, 0], alpha[..., 0, 0] = 1.0, 0.0
    assert is_neutral(picture, alpha) and not is_neutral(picture)
