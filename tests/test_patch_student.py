"""The bundled model's networks: an exact autoencoder that knows the timestep, in ComfyUI as in plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from host.comfy_in_process import InProcessComfy
from host.node_pack import load_pack, models_folder
from tadsr.schedule import alpha_bar
from tadsr.weights import save
from training.images import to_tensor
from training.mini.pack import weights_of
from training.mini.patches import Patches, fit_patches
from training.mini.student import PatchStudent
from training.networks.inference import Restorer

FILE = "random-patches.safetensors"


@pytest.fixture(scope="module")
def photograph(repository: Path) -> np.ndarray:
    """A photograph, uint8 (256, 384, 3)."""
    return np.array(Image.open(repository / "assets" / "sample.jpg").convert("RGB").resize((384, 256)))


@pytest.fixture(scope="module")
def patches(photograph: np.ndarray) -> Patches:
    return fit_patches(photograph[None])


@pytest.fixture(scope="module")
def picture(photograph: np.ndarray) -> Tensor:
    """A part of it, (1, 3, 64, 96) in [-1, 1]."""
    return to_tensor(photograph[80:144, 120:216]) * 2 - 1


@pytest.fixture(scope="module")
def student(patches: Patches) -> PatchStudent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchStudent(patches).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def noisy(patches: Patches) -> PatchStudent:
    """A student with noise in all that training starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = PatchStudent(patches).eval().requires_grad_(False)
        for part in (student.residual, student.decoder):
            for parameter in part.parameters():
                if parameter.ndim == 4 and not parameter.any():
                    nn.init.normal_(parameter, std=0.2 / parameter[0].numel() ** 0.5)
    return student


def decibels(a: Tensor, b: Tensor) -> float:
    return -10 * torch.log10((a - b).square().mean() / 4).item()


@torch.inference_mode()
def test_components_are_orthonormal_and_of_unit_size(patches: Patches, photograph: np.ndarray) -> None:
    assert torch.allclose(patches.components @ patches.components.T, torch.eye(len(patches.components)), atol=1e-5)
    sizes = patches.encode(to_tensor(photograph) * 2 - 1).square().mean(dim=(0, 2, 3)).sqrt()
    assert torch.allclose(sizes, torch.ones_like(sizes), rtol=1e-3)
    assert (patches.deviations.diff() <= 0).all()


@torch.inference_mode()
@pytest.mark.parametrize("timestep", [1, 100, 500, 999])
def test_latents_are_components_that_follow_the_timestep(
    student: PatchStudent, patches: Patches, picture: Tensor, timestep: int
) -> None:
    latent = student.encode(picture, torch.tensor([timestep])) / alpha_bar(timestep).sqrt()
    assert torch.allclose(latent, patches.encode(picture), atol=5e-3)


@torch.inference_mode()
def test_the_start_gives_the_picture_back(student: PatchStudent, picture: Tensor) -> None:
    timestep = torch.tensor([500])
    assert decibels(student(picture, timestep), picture) > 40
    flat = torch.tensor([1.0, 0.3, -0.9])[None, :, None, None].expand(1, 3, 32, 32)
    assert (student(flat, timestep) - flat).abs().max() < 2 / 255, "a flat colour moves by less than a level"


@torch.inference_mode()
def test_comfyui_and_plain_torch_give_the_same_picture(
    noisy: PatchStudent, photograph: np.ndarray, comfy_inprocess: InProcessComfy
) -> None:
    path = models_folder(comfy_inprocess) / "tadsr" / FILE
    save(path, weights_of(noisy, steps=0, dtype=torch.float32))
    pack = load_pack(comfy_inprocess, FILE)
    small = np.ascontiguousarray(photograph[40:53, 60:77])
    wanted = Restorer.load(path)(to_tensor(small), 300)
    result = pack.upscale(to_tensor(small).movedim(1, -1), timestep=300)
    assert result.shape == (1, 52, 68, 3)
    assert torch.allclose(result.movedim(-1, 1), wanted, atol=1e-4)
    plain = Restorer(*(getattr(Restorer.load(path), name) for name in ("encoder", "unet", "decoder", "prompt")))
    plain.unet.conv_norm_out.eps = 1e-5
    assert not torch.allclose(plain(to_tensor(small), 300), wanted, atol=1e-3), "the epsilon does matter"


def test_comfyui_knows_the_latents(comfy_inprocess: InProcessComfy) -> None:
    pack = load_pack(comfy_inprocess, FILE)
    latent_format = pack.model.model.latent_format
    assert (latent_format.latent_channels, latent_format.spacial_downscale_ratio) == (24, 4)
    assert (pack.vae.latent_channels, pack.vae.downscale_ratio) == (24, 4)
