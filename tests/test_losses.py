from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from test_teacher import TOLERANCE, one_adapter, reference_teacher, relative_error
from torch import Tensor

from tadsr.schedule import alpha_bar, teacher_timestep
from training.config.train_config import GUIDANCE
from training.networks.teacher import Teacher
from training.objective.losses import (
    Score,
    Tavsd,
    blur,
    blur_sigma,
    blur_size,
    blurred_mse,
    diffusion_loss,
    guidance_scale,
    mse,
    shared_crop,
    tavsd,
)


def test_kernel_grows_with_the_timestep() -> None:
    assert [blur_size(t) for t in (1, 199, 200, 500, 999)] == [5, 5, 9, 13, 21]
    assert blur_sigma(999) == pytest.approx(5.995)


def test_blur_keeps_a_constant_and_loses_to_identity_nowhere() -> None:
    image = torch.full((2, 3, 24, 30), 0.25)
    assert torch.allclose(blur(image, torch.tensor([1, 999])), image, atol=1e-6)


def test_blurred_mse_matches_the_official_numbers(shared_reference: Path) -> None:
    reference = load_file(shared_reference / "losses_S64.safetensors")
    result = reference["blur.pred"].clone().requires_grad_()
    loss = blurred_mse(result, reference["blur.tgt"], reference["blur.timesteps"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(reference["blur.loss"].item(), rel=1e-5)
    assert result.grad is not None
    assert torch.allclose(result.grad, reference["blur.grad_pred"], atol=1e-8, rtol=1e-4)
    blurred = blur(reference["blur.pred"], reference["blur.timesteps"])
    assert torch.allclose(blurred, reference["blur.pred_blur"], atol=1e-6)


DRAWS = ("a", "b", "c")  # student timesteps (1, 999), (100, 500), (300, 750)
KINDS: dict[str, Literal["all", "middle"]] = {
    "official": "middle",
    "allactive": "all",
}  # which of the fake score's adapters work


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(kind: str, shared_reference: Path) -> Teacher:
    return reference_teacher(shared_reference, KINDS[kind])


@pytest.fixture(scope="module")
def recorded(shared_reference: Path) -> dict[str, Tensor]:
    return load_file(shared_reference / "losses_S64.safetensors")


def distill(teacher: Teacher, recorded: dict[str, Tensor], name: str, z0: Tensor) -> Tavsd:
    """Returns the distillation at the recorded noise and teacher timesteps."""
    prompts = recorded["prompt_embeds"], recorded["neg_prompt_embeds"]
    return tavsd(z0, recorded[f"{name}.noise"], recorded[f"{name}.tv"], teacher, teacher.teach, *prompts, GUIDANCE)


@pytest.mark.parametrize("draw", DRAWS)
def test_tavsd_matches_the_official_numbers(
    teacher: Teacher, recorded: dict[str, Tensor], kind: str, draw: str
) -> None:
    name = f"tavsd.{kind}.{draw}"
    assert torch.equal(teacher_timestep(recorded[f"{name}.model_timesteps"]), recorded[f"{name}.tv"])
    z0 = recorded["latents"].clone().requires_grad_()
    result = distill(teacher, recorded, name, z0)
    result.loss.mean().backward()
    assert result.loss.shape == result.weight.shape == (2,)
    assert relative_error(result.loss.mean(), recorded[f"{name}.loss"]) <= TOLERANCE
    assert relative_error(result.weight, recorded[f"{name}.weight"]) <= TOLERANCE
    assert relative_error(result.x0_real, recorded[f"{name}.x0_fix"]) <= TOLERANCE
    assert relative_error(result.x0_fake, recorded[f"{name}.x0_update"]) <= TOLERANCE
    assert relative_error(z0.grad, recorded[f"{name}.grad_latents"]) <= TOLERANCE
    assert relative_error(2 * result.gradient / z0.numel(), recorded[f"{name}.grad_latents"]) <= TOLERANCE
    assert all(parameter.grad is None for parameter in teacher.parameters())


def by_hand(prediction: Callable[[Tensor], Tensor]) -> Score:
    """Returns a score whose noise prediction follows from the context alone, (B, 1, 1)."""
    return lambda z, timestep, context: prediction(context)[..., None].expand_as(z)


def test_tavsd_by_hand() -> None:
    """Constant predictions, without noise: what equation 6 says, signs and all, for two samples.

    Sample n: teacher -0.1 without and c_n with the prompt, fake score c_n / 2, guidance 2 + t / 200.
    """
    c, t = torch.tensor([0.3, 0.7]), torch.tensor([200, 600])
    z0 = torch.full((2, 4, 2, 3), 0.5, requires_grad=True)
    context, negative = c[:, None, None], torch.full((2, 1, 1), -0.1)
    scores = (by_hand(lambda context: context / 2), by_hand(lambda context: context))
    result = tavsd(z0, torch.zeros(2, 4, 2, 3), t, *scores, context, negative, 2.0)
    result.loss.sum().backward()

    ratio = ((1 - alpha_bar(t)) / alpha_bar(t)).sqrt()  # of noise to signal: x0 = z0 - ratio * prediction
    guided = -0.1 + torch.tensor([3.0, 5.0]) * (c + 0.1)
    weight = ratio * guided  # mean |z0 - x0_real|
    gradient = ratio * (guided - c / 2) / weight  # (x0_fake - x0_real) / weight: above 0, so a step goes to x0_real
    assert (gradient > 0).all()
    torch.testing.assert_close(result.x0_real[:, 0, 0, 0], 0.5 - ratio * guided)
    torch.testing.assert_close(result.x0_fake[:, 0, 0, 0], 0.5 - ratio * c / 2)
    torch.testing.assert_close(result.weight, weight)
    torch.testing.assert_close(result.gradient, gradient[:, None, None, None].expand_as(z0))
    torch.testing.assert_close(result.loss.detach(), gradient**2)
    torch.testing.assert_close(z0.grad, (2 * gradient / z0[0].numel())[:, None, None, None].expand_as(z0))


def test_noise_is_added_at_the_teacher_s_timestep_and_taken_away_again() -> None:
    """A teacher that knows the noise sees the student's own latent, whatever the guidance."""
    z0, noise, t = torch.full((1, 4, 2, 2), 0.25), torch.full((1, 4, 2, 2), -2.0), torch.tensor([300])
    seen: list[Tensor] = []

    def knowing(z: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        seen.append(z)
        return torch.full_like(z, -2.0)

    result = tavsd(z0, noise, t, knowing, knowing, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 7.5)
    torch.testing.assert_close(result.x0_real, z0)
    expected = alpha_bar(300).sqrt() * 0.25 + (1 - alpha_bar(300)).sqrt() * -2.0
    assert len(seen) == 2 and all(z.allclose(expected) for z in seen)


def test_diffusion_loss_by_hand() -> None:
    """Equation 10: the error of the noise, at the noisy latent, on latents that get no gradient."""
    z0 = torch.full((2, 4, 2, 2), 2.0, requires_grad=True)
    noise, t = torch.ones(2, 4, 2, 2), torch.tensor([0, 800])
    scale = torch.tensor(0.5, requires_grad=True)
    loss = diffusion_loss(
        lambda z, timestep, context: scale * z + context[..., None], z0, noise, t, torch.ones(2, 1, 1)
    )
    noisy = alpha_bar(t).sqrt() * 2 + (1 - alpha_bar(t)).sqrt()
    torch.testing.assert_close(loss.detach(), (0.5 * noisy + 1 - 1) ** 2)
    loss.sum().backward()
    assert z0.grad is None
    torch.testing.assert_close(scale.grad, (noisy**2).sum())  # of (scale * noisy)^2


@pytest.mark.parametrize("timestep", [1, 250, 999])
def test_blurred_mse_by_hand(timestep: int) -> None:
    """Of two pictures that differ in one number: the kernel of equation 14 squared."""
    target, result = torch.zeros(1, 3, 31, 33), torch.zeros(1, 3, 31, 33)
    result[0, 1, 15, 16] = 0.5
    reach = 2 + 2 * (timestep // 200)
    line = [math.exp(-0.5 * (x / (1 + timestep / 200)) ** 2) for x in range(-reach, reach + 1)]
    square = sum(w * w for w in line) / sum(line) ** 2  # of the normalised kernel along one axis
    expected = (0.5 * square) ** 2 / target.numel()
    assert blurred_mse(result, target, torch.tensor([timestep])).item() == pytest.approx(expected, rel=1e-5)


def test_images_are_shared_crop_alike() -> None:
    image = torch.arange(16.0).expand(1, 3, 16, 16) + 16 * torch.arange(16.0)[:, None]
    part, same = shared_crop((image, image.clone()), 2, 5, 7)
    assert torch.equal(part, same) and part.shape == (1, 3, 9, 9)
    assert part[0, 0, 0, 0].item() == 16 * 2 + 5 and part[0, 0, 8, 8].item() == 16 * 10 + 13
    assert torch.equal(shared_crop((image,), 0, 0, 0)[0], image)


def test_weaker_guidance_pulls_less() -> None:
    z0, noise = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    context, negative = torch.ones(1, 1, 1), -torch.ones(1, 1, 1)
    timestep = torch.tensor([200])

    def score(z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return c[:, :, :, None].expand_as(z) * 0.1

    pulls = [tavsd(z0, noise, timestep, score, score, context, negative, g).x0_real.mean() for g in (0.0, 1.0)]
    signal = alpha_bar(200)
    # unconditional -0.1, conditional 0.1, scale g + 1: noise 0.1 and 0.3
    expected = -torch.tensor([0.1, 0.3]) * ((1 - signal) / signal).sqrt()
    assert torch.allclose(torch.stack(pulls), expected, rtol=1e-5)


def test_guidance_is_that_of_the_recorded_report(shared_reference: Path) -> None:
    report = json.loads((shared_reference / "losses_S64_report.json").read_text())
    for draw in DRAWS:
        expected = report[f"tavsd.official.{draw}."]
        scale = guidance_scale(torch.tensor(expected["tv"]), GUIDANCE)
        assert torch.allclose(scale, torch.tensor(expected["cfg"])), f"guidance of draw {draw}"


def test_plain_vsd_is_the_same_at_random_timesteps(teacher: Teacher, recorded: dict[str, Tensor], kind: str) -> None:
    name = f"tavsd.{kind}.none"
    result = distill(teacher, recorded, name, recorded["latents"])
    assert relative_error(result.loss.mean(), recorded[f"{name}.loss"]) <= TOLERANCE


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    """Without its guard, the weight would divide 0 by 0."""

    def score(z_t: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return noise.repeat(len(z_t) // len(noise), 1, 1, 1)

    noise, context = torch.ones(2, 4, 2, 2), torch.zeros(2, 1, 1)
    z0 = torch.zeros(2, 4, 2, 2, requires_grad=True)
    result = tavsd(z0, noise, torch.tensor([0, 0]), score, score, context, context, GUIDANCE)
    result.loss.sum().backward()
    assert result.loss.tolist() == [0, 0] and z0.grad is not None and not z0.grad.any()


def test_diffusion_loss_matches_the_official_numbers(teacher: Teacher, recorded: dict[str, Tensor], kind: str) -> None:
    name = f"diff.{kind}"
    noise, timesteps = recorded[f"{name}.noise"], recorded[f"{name}.timesteps"]
    z0 = recorded["latents"].clone().requires_grad_()
    loss = diffusion_loss(teacher, z0, noise, timesteps, recorded["prompt_embeds"])
    assert loss.shape == (2,)
    loss.mean().backward()
    assert z0.grad is None
    assert relative_error(loss.mean(), recorded[f"{name}.loss"]) <= TOLERANCE
    parameters = teacher.trainable()
    expected = {key.removeprefix(f"{name}.grad."): t for key, t in recorded.items() if key.startswith(f"{name}.grad.")}
    assert len(expected) == {"official": 2, "allactive": 6}[kind]
    for key, gradient in expected.items():
        assert relative_error(parameters[f"unet.{one_adapter(key)}"].grad, gradient) <= TOLERANCE, key
    teacher.zero_grad()


def test_mse_is_per_sample() -> None:
    target = torch.zeros(2, 3, 4, 4)
    assert mse(target + torch.tensor([1.0, 2.0])[:, None, None, None], target).tolist() == [1, 4]
