"""The whole method in plain torch against the recorded outputs of the official implementation.

The weights are random, so this tests that the computation is equal and says nothing of picture quality. Recorded runs
differ among themselves by up to 2e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from host import torch_import_shim
from tadsr.convert import convert_official
from tadsr.encoder import EncoderConfig, TimeAwareEncoder, mode, sample
from tadsr.keys import ldm_unet_to_diffusers, ldm_vae_to_diffusers
from tadsr.schedule import LATENT_SCALE, x0_from_residual
from tadsr.weights import TadsrWeights, encoder_state_dict, unet_state_dict

TOLERANCE = 1e-4
TIMESTEPS = (1, 100, 300, 500, 750, 999)
SIZES = ("128x128", "96x160")


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def weights(shared_reference: Path) -> TadsrWeights:
    return convert_official(shared_reference / "tadsr.pkl", shared_reference / "sd_original.safetensors")


@pytest.fixture(scope="module")
def encoder(weights: TadsrWeights) -> TimeAwareEncoder:
    state = encoder_state_dict(weights, weights.base_vae)
    network = TimeAwareEncoder(EncoderConfig.from_state_dict(state))
    network.load_state_dict(state, strict=True)
    return network.eval()


@pytest.fixture(scope="module", params=SIZES)
def recorded(request: pytest.FixtureRequest, shared_reference: Path) -> dict[str, Tensor]:
    return load_file(shared_reference / f"infer_S64_{request.param}.safetensors")


@pytest.fixture(scope="module")
def diffusers() -> Any:
    torch_import_shim.install()
    return pytest.importorskip("diffusers", reason="diffusers is not installed (training only)")


def diffusers_unet(diffusers: Any, reference: Path, state: dict[str, Tensor]) -> torch.nn.Module:
    """Returns a diffusers UNet with tensors in single-file names."""
    config = diffusers.UNet2DConditionModel.load_config(reference / "unet")
    network = diffusers.UNet2DConditionModel.from_config(config)
    network.load_state_dict(ldm_unet_to_diffusers(state), strict=True)
    return network.eval()


@pytest.fixture(scope="module")
def unet(diffusers: Any, weights: TadsrWeights, shared_reference: Path) -> torch.nn.Module:
    """The student as a diffusers module: base in single-file names, LoRA merged, names turned back."""
    merged = unet_state_dict(weights, weights.base_unet)
    state = {key.removeprefix("diffusion_model."): t for key, t in merged.items()}
    return diffusers_unet(diffusers, shared_reference, state)


@pytest.fixture(scope="module")
def decoder(diffusers: Any, weights: TadsrWeights) -> Any:
    network = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    network.load_state_dict(ldm_vae_to_diffusers(weights.base_vae), strict=True)
    return network.eval()


def assert_close(result: Tensor, expected: Tensor, what: str) -> None:
    difference = (result - expected).abs().max().item()
    assert difference <= TOLERANCE, f"{what} differs from the official implementation by {difference:.2e}"


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_encoder_moments(encoder: TimeAwareEncoder, recorded: dict[str, Tensor], timestep: int) -> None:
    moments = encoder(recorded["lq"], torch.tensor([timestep]))
    mean, logvar = moments.chunk(2, dim=1)
    assert_close(mean, recorded[f"t{timestep}.mean"], "mean")
    assert_close(logvar, recorded[f"t{timestep}.logvar"], "logvar")
    assert_close(mode(moments) * LATENT_SCALE, recorded[f"t{timestep}.mode.z"], "z")
    drawn = sample(moments, recorded[f"t{timestep}.eps"]) * LATENT_SCALE
    assert_close(drawn, recorded[f"t{timestep}.sample.z"], "sampled z")


def test_every_part_of_the_weights_matters(weights: TadsrWeights, shared_reference: Path) -> None:
    """Without LoRA the encoder gives the recorded numbers with adapters off, which are others."""
    recorded = load_file(shared_reference / "infer_S64_128x128.safetensors")
    plain = TadsrWeights({}, {}, {}, weights.encoder_time, None, weights.base, weights.metadata)
    state = encoder_state_dict(plain, plain.base_vae)
    network = TimeAwareEncoder(EncoderConfig.from_state_dict(state))
    network.load_state_dict(state, strict=True)
    mean = mode(network(recorded["lq"], torch.tensor([500])))
    assert_close(mean, recorded["t500.nolora.mean"], "mean without LoRA")
    assert (mean - recorded["t500.mean"]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("draw", ["mode", "sample"])
def test_prediction_and_clean_latent(
    unet: torch.nn.Module, recorded: dict[str, Tensor], timestep: int, draw: str
) -> None:
    name = f"t{timestep}.{draw}"
    z = recorded[f"{name}.z"]
    prediction = unet(z, torch.tensor([timestep]), recorded["prompt_embeds"], return_dict=False)[0]
    assert_close(prediction, recorded[f"{name}.unet"], "prediction")
    assert_close(x0_from_residual(z, prediction, timestep), recorded[f"{name}.x0"], "x0")


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_decoded_picture(decoder: Any, recorded: dict[str, Tensor], timestep: int) -> None:
    picture = decoder.decode(recorded[f"t{timestep}.mode.x0"] / LATENT_SCALE, return_dict=False)[0]
    assert_close(picture, recorded[f"t{timestep}.mode.dec_unclamped"], "picture")


@pytest.mark.parametrize("size", SIZES)
def test_base_model_alone(
    diffusers: Any, weights: TadsrWeights, decoder: Any, shared_reference: Path, size: str
) -> None:
    """Finds a fault in the base's conversion, apart from those of the LoRA."""
    expected = load_file(shared_reference / "base_S64.safetensors")
    recorded = load_file(shared_reference / f"infer_S64_{size}.safetensors")
    posterior = decoder.encode(recorded["lq"]).latent_dist
    assert_close(posterior.mean, expected[f"{size}.vae_mean"], "VAE mean")
    assert_close(posterior.logvar, expected[f"{size}.vae_logvar"], "VAE logvar")
    base = {key.removeprefix("diffusion_model."): t for key, t in weights.base_unet.items()}
    network = diffusers_unet(diffusers, shared_reference, base)
    z = recorded["t500.mode.z"]  # the input that was recorded for all three timesteps
    for timestep in (1, 500, 999):
        prediction = network(z, torch.tensor([timestep]), recorded["prompt_embeds"], return_dict=False)[0]
        assert_close(prediction, expected[f"{size}.t{timestep}.unet_base"], f"base prediction at {timestep}")


def test_a_batch_may_carry_a_timestep_for_each_picture(
    encoder: TimeAwareEncoder, unet: torch.nn.Module, recorded: dict[str, Tensor]
) -> None:
    timesteps = torch.tensor(TIMESTEPS)
    z = mode(encoder(recorded["lq"].expand(len(timesteps), -1, -1, -1), timesteps)) * LATENT_SCALE
    context = recorded["prompt_embeds"].expand(len(timesteps), -1, -1)
    x0 = x0_from_residual(z, unet(z, timesteps, context, return_dict=False)[0], timesteps)
    assert_close(x0, torch.cat([recorded[f"t{t}.mode.x0"] for t in TIMESTEPS]), "x0 of the batch")
