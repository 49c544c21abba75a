"""The training of the bundled model's base: how it starts, both stages with a resume, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from training_pictures import save_picture

from tadsr.schedule import alpha_bar
from training.data.prompts import PromptBook
from training.metrics.lpips import LPIPS
from training.mini.networks import MiniStudent
from training.mini.pretraining import PretrainingConfig, learning_rate, pretrain
from training.mini.start import follow_timestep
from training.mini.teacher import DEGRADED, PHOTOGRAPH, TeacherConfig, TeacherStage, write_teacher
from training.mini.vae import VaeConfig, VaeStage, load_vae, standardise, write_vae
from training.networks.base import load_base

TIMESTEPS = (1, 500, 999)
C = TypeVar("C", bound=PretrainingConfig)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(6):
        save_picture(folder / f"{number}.png", 64, 72, seed=number)
    return folder


@pytest.fixture
def picture(repository: Path) -> torch.Tensor:
    """A part of a photograph, (1, 3, 96, 96) in [-1, 1]."""
    photograph = Image.open(repository / "assets" / "sample.jpg").convert("RGB").resize((384, 256))
    return torch.from_numpy(np.array(photograph)[80:176, 120:216]).permute(2, 0, 1)[None].float() / 127.5 - 1


def settings(kind: type[C], photographs: Path, output: Path, **more: Any) -> C:
    small: dict[str, Any] = {"steps": 4, "batch": 2, "crop": 32, "warmup_steps": 1, "held_out": 1, "workers": 0}
    return kind(data=photographs, output=output, save_every=2, log_every=1, **small, **more)


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10((a - b).square().mean() / 4).item()


def test_learning_rate_warms_up_and_decays() -> None:
    config = PretrainingConfig(data=Path(), output=Path(), steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in (0, 99, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.51, 0.02])


@torch.inference_mode()
def test_the_start_is_an_averaging_autoencoder(picture: torch.Tensor) -> None:
    torch.manual_seed(0)
    networks = MiniStudent()
    smooth = torch.nn.functional.interpolate(
        torch.nn.functional.interpolate(picture, scale_factor=0.25, mode="bicubic", antialias=True),
        scale_factor=4,
        mode="bicubic",
    )
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))  # the networks pad with zeros
    assert decibels(networks.decode(networks.encode(smooth, torch.ones(1)))[inner], smooth[inner]) > 40


@torch.inference_mode()
def test_latents_follow_the_timestep(picture: torch.Tensor) -> None:
    torch.manual_seed(0)
    networks = MiniStudent()
    follow_timestep(networks.encoder)
    spreads = [(networks.encode(picture, torch.tensor([t])) / alpha_bar(t).sqrt()).std().item() for t in TIMESTEPS]
    assert max(spreads) < 1.5 * min(spreads), f"spreads {spreads}: without the fit they differ by 14 times"


@torch.inference_mode()
def test_standardising_keeps_the_picture(picture: torch.Tensor) -> None:
    torch.manual_seed(0)
    networks = MiniStudent()
    torch.nn.init.normal_(networks.encoder.quant_conv.bias[:4], std=3.0)
    follow_timestep(networks.encoder)
    before = networks.decode(networks.encode(picture, torch.ones(1)))
    standardise(networks, picture)
    latent = networks.encode(picture, torch.ones(1))
    assert torch.allclose(networks.decode(latent), before, atol=1e-4)
    assert latent.std(dim=(0, 2, 3)).tolist() == pytest.approx([1.0] * 4, rel=1e-4)
    late = networks.encode(picture, torch.tensor([999]))
    assert late.mean(dim=(0, 2, 3)).abs().max() < 0.25, "a constant part would be multiplied by 15 in x0"


def vae_stage(config: VaeConfig) -> VaeStage:
    torch.manual_seed(0)
    return VaeStage(config)


def test_both_stages_resume_to_the_bit_and_make_a_base(
    photographs: Path, tmp_path: Path, one_thread: None, lpips_network: Callable[[str], LPIPS]
) -> None:
    lpips_network("vgg")  # the training loads its own
    averages = {}
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        config = settings(VaeConfig, photographs, tmp_path / name, judge_from=0.25)
        for stop in stops:
            averages[name] = pretrain(vae_stage(config), config, stop_after=stop)
    for key, tensor in averages["whole"].items():
        assert torch.equal(tensor, averages["resumed"][key]), f"{key}: something of the run is not in the checkpoint"
    vae = write_vae(config, averages["whole"])
    start, trained = MiniStudent().decoder.state_dict(), load_vae(vae).decoder.state_dict()
    assert any(not torch.equal(start[key], trained[key]) for key in start)

    config = settings(TeacherConfig, photographs, tmp_path / "teacher", vae=vae)
    torch.manual_seed(0)
    stage = TeacherStage(config)
    kept = {name: p.clone() for name, p in stage.networks.named_parameters() if not name.startswith("unet.")}
    prompt = stage.prompts[DEGRADED].clone()
    pretrain(stage, config)
    assert all(torch.equal(p, kept[n]) for n, p in stage.networks.named_parameters() if n in kept), "the VAE is frozen"
    assert not torch.equal(stage.prompts[DEGRADED], prompt), "prompts are learned"
    base = write_teacher(stage, tmp_path / "base", steps=4)
    assert torch.equal(load_base(base).unet.conv_out.weight, stage.networks.unet.conv_out.weight)
    book = PromptBook.build([PHOTOGRAPH, DEGRADED], base, None, tmp_path)
    assert torch.equal(book.batch([DEGRADED])[0], stage.prompts[DEGRADED])


def test_a_decoder_trained_further_keeps_latents_and_teacher(
    photographs: Path, tmp_path: Path, lpips_network: Callable[[str], LPIPS]
) -> None:
    lpips_network("vgg")  # the training loads its own
    first = write_vae_start(photographs, tmp_path)
    teacher = settings(TeacherConfig, photographs, tmp_path / "teacher", vae=first)
    pretrain(TeacherStage(teacher), teacher)
    config = settings(
        VaeConfig, photographs, tmp_path / "decoder", decoder_of=first, judge_from=0.5, lpips_precision="bf16"
    )
    vae = write_vae(config, pretrain(vae_stage(config), config))
    before, after = load_vae(first).state_dict(), load_vae(vae).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoder."))
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("decoder."))

    again = replace(teacher, vae=vae)
    stage = TeacherStage(again)
    pretrain(stage, again)  # trained already: it only takes up the decoder
    assert torch.equal(stage.networks.decoder.conv_in.weight, after["decoder.conv_in.weight"])


def test_the_teacher_learns_to_predict_noise(photographs: Path, tmp_path: Path) -> None:
    config = settings(TeacherConfig, photographs, tmp_path, vae=write_vae_start(photographs, tmp_path))
    torch.manual_seed(0)
    stage = TeacherStage(config)
    lq, hq = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    optimizer = torch.optim.AdamW(stage.groups()[0]["params"], lr=1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(1)  # the same noise: it can be learned by heart
        loss = stage.losses(lq, hq, 0.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.1), "an untrained teacher predicts zero, and noise has a variance of 1"
    assert losses[-1] < 0.8 * losses[0]


def write_vae_start(photographs: Path, folder: Path) -> Path:
    """Writes the autoencoder that the training starts from."""
    config = settings(VaeConfig, photographs, folder)
    return write_vae(config, {f"networks.{name}": p for name, p in MiniStudent().named_parameters()})
