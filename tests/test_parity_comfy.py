"""Our nodes inside ComfyUI against recorded numbers of the official implementation, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import Pack, load_pack, models_folder
from tadsr.convert import convert_official
from tadsr.schedule import LATENT_SCALE
from tadsr.weights import save

TIMESTEPS = (1, 100, 300, 500, 750, 999)
SHAPES = ("128x128", "96x160")
TOLERANCE = 2e-4  # of the recorded standard deviation; two runs of the official code differ by up to 2e-5
SEED_BASE = 1000  # the recorded noise is randn after manual_seed(1000 + t)
FILE_NAME = "reference.safetensors"


@pytest.fixture(scope="module")
def nodes(comfy_inprocess: InProcessComfy, shared_reference: Path) -> Pack:
    base = shared_reference / "sd_original.safetensors"
    save(models_folder(comfy_inprocess) / "tadsr" / FILE_NAME, convert_official(shared_reference / "tadsr.pkl", base))
    pack = load_pack(comfy_inprocess, FILE_NAME)
    assert pack.prompt is None, "the reference file has no prompt"
    return pack


@pytest.fixture(scope="module")
def recordings(shared_reference: Path) -> dict[str, dict[str, Tensor]]:
    return {shape: load_file(shared_reference / f"infer_S64_{shape}.safetensors") for shape in SHAPES}


def _assert_equal(what: str, ours: Tensor, recorded: Tensor) -> None:
    assert ours.shape == recorded.shape, what
    error = float((ours - recorded).abs().max() / recorded.std())
    assert error <= TOLERANCE, f"{what}: largest error {error:.2e} of the recorded standard deviation"


def _assert_near(what: str, ours: Tensor, recorded: Tensor) -> None:
    """As _assert_equal, with the root mean square of the error.

    For the picture at the end: the random decoder enlarges the rounding of its input eight times, so that single
    pixels reach 3.3e-4, where the root mean square is 2.3e-5. Against float64 the rounding is that of the CPU's
    convolutions; each network given its recorded input is below 5e-5 everywhere.
    """
    assert ours.shape == recorded.shape, what
    error = float((ours - recorded).square().mean().sqrt() / recorded.std())
    assert error <= TOLERANCE, f"{what}: RMS error {error:.2e} of the recorded standard deviation"


def _signed(image: Tensor) -> Tensor:
    """Returns an IMAGE as the official code's pictures: (B, H, W, C) in [0, 1] -> (B, C, H, W) in [-1, 1]."""
    return image.movedim(-1, 1) * 2 - 1


def _image(recorded: Mapping[str, Tensor]) -> Tensor:
    return recorded["lq_uint8"].float().div(255).movedim(1, -1)


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_encoder_moments(nodes: Pack, recordings: dict[str, dict[str, Tensor]], shape: str, timestep: int) -> None:
    recorded = recordings[shape]
    mean, logvar = nodes.encoder.moments(_image(recorded).movedim(-1, 1), timestep).chunk(2, dim=1)
    _assert_equal("mean", mean, recorded[f"t{timestep}.mean"])
    _assert_equal("log-variance", logvar, recorded[f"t{timestep}.logvar"])


@pytest.mark.parametrize("encoding", ["mode", "sample"])
@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_latent_x0_and_picture(
    nodes: Pack, recordings: dict[str, dict[str, Tensor]], shape: str, timestep: int, encoding: str
) -> None:
    recorded = recordings[shape]
    key = f"t{timestep}.{encoding}"
    latent, enlarged = nodes.encode(_image(recorded), timestep, scale=1.0, encoding=encoding, seed=SEED_BASE + timestep)
    _assert_equal("z", latent["samples"] * LATENT_SCALE, recorded[f"{key}.z"])
    assert torch.equal(enlarged, _image(recorded)), "at scale 1 the picture itself is the reference"
    result = nodes.one_step(latent, conditioning=[[recorded["prompt_embeds"], {}]])
    _assert_equal("x0", result["samples"] * LATENT_SCALE, recorded[f"{key}.x0"])
    _assert_near("decoded picture", _signed(nodes.decode(result)), recorded[f"{key}.dec_unclamped"].clamp(-1, 1))


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_decoder(nodes: Pack, recordings: dict[str, dict[str, Tensor]], shape: str, timestep: int) -> None:
    key, recorded = f"t{timestep}.mode", recordings[shape]
    decoded = nodes.decode({"samples": recorded[f"{key}.x0"] / LATENT_SCALE})
    _assert_equal("decoded x0", _signed(decoded), recorded[f"{key}.dec_unclamped"].clamp(-1, 1))


@torch.inference_mode()
def test_the_adapters_matter(nodes: Pack, recordings: dict[str, dict[str, Tensor]]) -> None:
    """Without LoRA the official network gives other moments and predictions: the tests above can fail."""
    recorded = recordings[SHAPES[0]]
    mean, prediction = recorded["t500.mean"], recorded["t500.mode.unet"]
    assert (recorded["t500.nolora.mean"] - mean).abs().max() > 100 * TOLERANCE * mean.std()
    assert (recorded["t500.nolora.unet"] - prediction).abs().max() > 100 * TOLERANCE * prediction.std()
