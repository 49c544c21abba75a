"""Training of the bundled model: data, one run with a resume, and the exported file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.schedule import LATENT_SCALE, alpha_bar
from tadsr.weights import load, save
from training.discriminator import Discriminator, hinge_loss, realism_loss
from training.export_mini import load_student, student_from_weights, weights_from_student
from training.lpips import LPIPS
from training.mini import MiniStudent, scale_gradient
from training.train_mini import (
    LPIPS_SHIFT,
    MiniConfig,
    draw_timesteps,
    enlarge_lq,
    learning_rate,
    make_pair,
    match_colours,
    sharpen,
    shifted,
    train,
    training_loss,
)

CONFIG = MiniConfig(steps=4, batch=2, crop=32, warmup_steps=1, validation_crops=1)


def crops(count: int = 6) -> np.ndarray:
    ramp = np.linspace(0, 255, 64, dtype=np.float32)
    picture = np.stack([np.add.outer(ramp, ramp) / 2, np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64))], -1)
    return np.stack([np.roll(picture, 7 * i, axis=1) for i in range(count)]).astype(np.uint8)


def test_pairs_depend_on_their_index_only() -> None:
    data = crops()
    (lq, hq), (again, _), (other, _) = (make_pair(data, CONFIG, index) for index in (3, 3, 4))
    assert torch.equal(lq, again) and not torch.equal(lq, other)
    assert lq.shape == hq.shape == (3, 32, 32) and hq.abs().max() <= 1
    assert (lq - hq).abs().mean() < 0.5  # the same picture, degraded


def test_learning_rate_warms_up_and_decays() -> None:
    config = MiniConfig(steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in (0, 99, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.51, 0.02])


def test_a_new_student_s_latents_have_one_size_at_all_timesteps() -> None:
    torch.manual_seed(0)
    student = MiniStudent()
    picture = torch.from_numpy(crops(1)).permute(0, 3, 1, 2).float() / 127.5 - 1
    spreads = []
    with torch.inference_mode():
        for timestep in (1, 500, 999):
            latent = student.encoder(picture, torch.tensor([timestep]))[:, :4] * LATENT_SCALE
            spreads.append((latent / alpha_bar(timestep).sqrt()).std().item())
    assert max(spreads) < 3 * min(spreads), f"spreads {spreads}: without the fit they differ by 14 times"


@torch.inference_mode()
def test_a_new_student_returns_the_picture_it_got(repository: Path) -> None:
    torch.manual_seed(0)
    student = MiniStudent()
    photograph = np.asarray(Image.open(repository / "assets" / "sample.jpg").convert("RGB"))[40:80, 40:80]
    picture = enlarge_lq(photograph)[None]
    for timestep in (1, 500, 999):
        result = match_colours(student(picture, torch.tensor([timestep])), picture)
        error = (result - picture)[..., 8:-8, 8:-8]  # the networks pad with zeros
        decibels = -10 * torch.log10(error.square().mean() / 4).item()
        assert decibels > 40, f"{decibels:.1f} dB at timestep {timestep}: the start is not bicubic enlargement"


def test_timesteps_of_a_batch_ascend_through_the_whole_range() -> None:
    drawn = torch.stack([draw_timesteps(6) for _ in range(2000)])
    assert (drawn[:, 1:] >= drawn[:, :-1]).all()
    assert (drawn.min().item(), drawn.max().item()) == (1, 999)
    assert drawn.float().mean().item() == pytest.approx(500, abs=5)
    assert ((drawn - 1) // 166.5).long().eq(torch.arange(6)).float().mean() > 0.98  # one in each sixth


def test_sharpening_adds_the_unsharp_mask() -> None:
    edge = torch.zeros(2, 3, 20, 20)
    edge[..., 10:] = 0.5
    same, sharper = sharpen(edge, torch.tensor([0.0, 1.0]))
    assert torch.equal(same, edge[0])
    assert torch.allclose(sharper[..., 0], torch.zeros(3, 20), atol=1e-6)  # flat areas stay
    assert sharper[..., 9].max() < -0.1 and sharper[..., 10].min() > 0.6  # both sides of the edge overshoot


def test_images_are_shifted_alike_and_to_every_place() -> None:
    torch.manual_seed(0)
    image = torch.arange(16.0).expand(1, 3, 16, 16) + 16 * torch.arange(16.0)[:, None]
    places = set()
    for _ in range(500):
        part, same = shifted(image, image.clone())
        assert torch.equal(part, same) and part.shape == (1, 3, 16 - LPIPS_SHIFT, 16 - LPIPS_SHIFT)
        assert (part[0, 0, 1, 1] - part[0, 0, 0, 0]).item() == 17
        places.add(part[0, 0, 0, 0].item())
    assert len(places) > 0.9 * (LPIPS_SHIFT + 1) ** 2


def test_loss_asks_low_timesteps_for_pixels_and_high_ones_for_likeness(lpips_network: Callable[[str], LPIPS]) -> None:
    perceptual, judge = lpips_network("vgg"), Discriminator()
    target = torch.from_numpy(crops(1)).permute(0, 3, 1, 2).float()[..., :32, :32] / 127.5 - 1

    def loss(result: torch.Tensor, timestep: int) -> float:
        return training_loss(CONFIG, perceptual, judge, result, target, torch.tensor([timestep]))[0].item()

    shift, noise = target + 0.1, target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    assert loss(target, 100) < loss(noise, 100) and loss(target, 100) < loss(shift, 100)
    assert loss(noise, 900) / loss(shift, 900) > loss(noise, 100) / loss(shift, 100)


def test_the_discriminator_learns_to_tell_photographs_from_blurred_ones(lpips_network: Callable[[str], LPIPS]) -> None:
    torch.manual_seed(0)
    perceptual, judge = lpips_network("vgg"), Discriminator()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    sharp = torch.rand(4, 3, 32, 32) * 2 - 1
    real, fake = perceptual.features(sharp), perceptual.features(torch.nn.functional.avg_pool2d(sharp, 3, 1, 1))
    losses = []
    for _ in range(20):
        loss = hinge_loss(judge(real), judge(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert (realism_loss(judge(real)) < realism_loss(judge(fake))).all()


def test_scale_gradient_scales_only_the_gradient() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor([0.5, 0.1]))
    y.sum().backward()
    assert torch.equal(y, x)
    assert x.grad is not None and x.grad.tolist() == pytest.approx([0.5, 0.1])


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, lpips_network: Callable[[str], LPIPS]) -> None:
    lpips_network("vgg")  # the training loads its own
    np.save(tmp_path / "crops.npy", crops())
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            train(replace(CONFIG, steps=4), tmp_path / "crops.npy", tmp_path / name, 2, 1, stop_after=steps)
    whole, resumed = (load_student(tmp_path / name / "checkpoint.pt") for name in ("whole", "resumed"))
    assert whole[1] == resumed[1] == 4
    for (key, a), b in zip(whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs: something that decides the run is not in the checkpoint"
    fresh = MiniStudent().state_dict()
    assert any(not torch.equal(value, fresh[key]) for key, value in whole[0].state_dict().items())


def test_a_run_can_start_from_a_weights_file(tmp_path: Path, lpips_network: Callable[[str], LPIPS]) -> None:
    lpips_network("vgg")  # the training loads its own
    torch.manual_seed(1)
    student = MiniStudent()
    torch.nn.init.normal_(student.unet.conv_out.weight, std=0.05)
    path = tmp_path / "mini.safetensors"
    save(path, weights_from_student(student, "0" * 64, 7, torch.float32))
    np.save(tmp_path / "crops.npy", crops())
    train(replace(CONFIG, learning_rate=1e-6), tmp_path / "crops.npy", tmp_path, 4, 1, stop_after=1, weights=path)
    trained, steps = load_student(tmp_path / "checkpoint.pt")
    assert steps == 7 + 1
    for (name, before), after in zip(student.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.allclose(before, after, atol=3e-6), f"{name} does not come from the weights file"


def test_export_and_load_give_the_same_pictures(tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = MiniStudent().eval()
    torch.nn.init.normal_(student.unet.conv_out.weight, std=0.05)
    path = tmp_path / "mini.safetensors"
    save(path, weights_from_student(student, "0" * 64, 7, torch.float32))
    again = student_from_weights(load(path))
    image, timestep = torch.rand(1, 3, 32, 48) * 2 - 1, torch.tensor([300])
    with torch.inference_mode():
        assert torch.allclose(student(image, timestep), again(image, timestep), atol=1e-5)
    assert load(path).metadata.extra["steps"] == "7"
