"""The Restorer: the recorded numbers, the pictures of the student it was made from, and sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nearly import assert_nearly, differ
from random_weights import random_student
from safetensors.torch import load_file
from torch import Tensor

from tadsr.color import COLOR_MATCHES, match_adain
from tadsr.convert import convert_official
from tadsr.errors import WeightsError
from tadsr.geometry import crop_padding, enlarge, pad_to_multiple
from tadsr.weights import Metadata, save
from training.mini import MiniStudent
from training.mini.export import weights_from_student
from training.networks.base import load_base
from training.networks.inference import Restorer
from training.networks.student import Student, student_weights

TOLERANCE = 1e-4  # recorded runs differ among themselves by up to 2e-5


@pytest.fixture(scope="module")
def bundled() -> MiniStudent:
    """The bundled model's networks with random weights."""
    return random_student()


@pytest.fixture(scope="module")
def mini(bundled: MiniStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its self-contained weights file."""
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    save(path, weights_from_student(bundled, source_sha256="", steps=0, dtype=torch.float32))
    return path


@pytest.fixture(scope="module")
def restorer(mini: Path) -> Restorer:
    return Restorer.load(mini)


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return (torch.rand(1, 3, height, width, generator=generator) * 255).round() / 255


@pytest.mark.parametrize("file", ["sd_original.safetensors", "."])
def test_recorded_numbers(shared_reference: Path, tmp_path: Path, file: str) -> None:
    """Latent, x0 and picture of the official code, from weights without and a base beside them."""
    recorded = load_file(shared_reference / "infer_S64_96x160.safetensors")
    save(tmp_path / "tadsr.safetensors", convert_official(shared_reference / "tadsr.pkl"))
    restorer = Restorer.load(tmp_path / "tadsr.safetensors", shared_reference / file)
    lq = recorded["lq"] / 2 + 0.5  # already of the result's size
    for timestep in (1, 500, 999):
        z = restorer.latent(lq, timestep, scale=1)
        assert (z - recorded[f"t{timestep}.mode.z"]).abs().max() <= TOLERANCE
        x0 = restorer.clean_latent(z, timestep, recorded["prompt_embeds"])
        assert (x0 - recorded[f"t{timestep}.mode.x0"]).abs().max() <= TOLERANCE
        expected = (recorded[f"t{timestep}.mode.dec_unclamped"] / 2 + 0.5).clamp(0, 1)
        result = restorer(lq, timestep, 1, recorded["prompt_embeds"], "none")
        assert (result - expected).abs().max() <= TOLERANCE
        matched = restorer(lq, timestep, 1, recorded["prompt_embeds"])
        assert (matched - match_adain(expected, lq).clamp(0, 1)).abs().max() <= 10 * TOLERANCE


@torch.inference_mode()
def test_pictures_are_those_of_the_networks(bundled: MiniStudent, restorer: Restorer) -> None:
    lq = picture(21, 34)
    reference = enlarge(lq, (84, 136))
    padded, padding = pad_to_multiple(reference, bundled.encoder.downscale)
    result = (bundled(padded * 2 - 1, torch.tensor([300])) / 2 + 0.5).clamp(0, 1)
    expected = match_adain(crop_padding(result, padding), reference).clamp(0, 1)
    assert (restorer(lq, 300) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (16, 16), (33, 18)])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_size_is_exact_and_the_range_kept(restorer: Restorer, size: tuple[int, int], scale: int) -> None:
    result = restorer(picture(*size), 500, scale)
    assert result.shape == (1, 3, scale * size[0], scale * size[1]) and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1


def test_timestep_context_and_match_matter(restorer: Restorer) -> None:
    lq = picture(16, 16)
    results = [restorer(lq, 1), restorer(lq, 999)]
    assert restorer.prompt is not None
    results += [
        restorer(lq, 1, context=restorer.prompt.flip(1) * 3),
        *(restorer(lq, 1, match=m) for m in COLOR_MATCHES),
    ]
    assert_nearly(results[0], results[3], "adain is the default")
    distinct = [results[i] for i in (0, 1, 2, 4, 5)]
    for i, a in enumerate(distinct):
        assert all(differ(a, b) for b in distinct[i + 1 :])


def test_a_grey_picture_stays_grey(restorer: Restorer) -> None:
    grey = picture(16, 16).mean(dim=1, keepdim=True).expand(1, 3, 16, 16)
    result = restorer(grey, 700)
    assert (result.amax(dim=1) - result.amin(dim=1)).max() < 1e-6


def test_merged_weights_give_the_picture_of_the_student_in_training(mini: Path, tmp_path: Path) -> None:
    base = load_base(mini)
    student = Student(base)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.trainable().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save(tmp_path / "out.safetensors", student_weights(student, Metadata(name="test", base_model="the mini")))
    saved = replace(Restorer.load(tmp_path / "out.safetensors", mini), prompt=base.prompt)
    live = Restorer(student.encoder, student.unet, student.decoder, base.prompt)
    lq = picture(16, 24)
    assert (saved(lq, 400) - live(lq, 400)).abs().max() < 1e-4
    reference = enlarge(lq, (64, 96)) * 2 - 1
    assert base.prompt is not None
    with torch.no_grad():
        image = student(reference, torch.tensor([400]), base.prompt).image
    assert torch.allclose(live(lq, 400, match="none"), image / 2 + 0.5, atol=1e-6)
    plain = Restorer.load(mini)
    assert (saved(lq, 400) - plain(lq, 400)).abs().max() > 1e-3, "the trained part is without effect"


def test_half_precision(mini: Path, restorer: Restorer) -> None:
    half = Restorer.load(mini, dtype=torch.bfloat16)
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    result, expected = half(picture(16, 16), 300), restorer(picture(16, 16), 300)
    assert result.dtype == torch.float32 and (result - expected).abs().mean() < 0.05


def test_what_is_missing_is_named(mini: Path, restorer: Restorer, tmp_path: Path) -> None:
    weights = student_weights(Student(load_base(mini)), Metadata(name="test", base_model="the mini"))
    save(tmp_path / "out.safetensors", weights)
    with pytest.raises(WeightsError, match="does not carry its base model; give its path besides: the mini"):
        Restorer.load(tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="no default prompt"):
        Restorer.load(tmp_path / "out.safetensors", mini)(picture(16, 16), 500)
    for timestep in (0, 1000):
        with pytest.raises(ValueError, match=f"timestep is {timestep}"):
            restorer(picture(8, 8), timestep)
    with pytest.raises(ValueError, match="scale is 9"):
        restorer(picture(8, 8), 500, 9)
