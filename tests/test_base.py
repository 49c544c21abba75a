"""Reading the base model: every container gives the same networks, and what is no SD 2.x base is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nearly import assert_nearly
from random_weights import adapters_for, random_student, sd_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.errors import WeightsError
from tadsr.schedule import LATENT_SCALE
from tadsr.weights import TadsrWeights, save
from training.mini import VAE_NORM_GROUPS, MiniStudent
from training.mini.export import weights_from_student
from training.networks.base import Base, LatentDecoder, load_base

UNET, VAE = "model.diffusion_model.", "first_stage_model."
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def base(shared_reference: Path) -> Base:
    return load_base(shared_reference / "sd_original.safetensors")


@pytest.fixture(scope="module")
def student() -> MiniStudent:
    return random_student()


@pytest.fixture(scope="module")
def mini_weights(student: MiniStudent) -> TadsrWeights:
    return weights_from_student(student, source_sha256="", steps=0, dtype=torch.float32)


@pytest.fixture(scope="module")
def mini(mini_weights: TadsrWeights) -> dict[str, Tensor]:
    """The tensors of a small model, in the single-file layout."""
    return mini_weights.base


def assert_same(a: Base, b: Base) -> None:
    for one, other in ((a.unet.state_dict(), b.unet.state_dict()), (a.encoder, b.encoder)):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    decoder = b.decoder.state_dict()
    assert all(torch.equal(tensor, decoder[key]) for key, tensor in a.decoder.state_dict().items())


def test_a_file_and_a_folder_are_the_same_base(base: Base, shared_reference: Path) -> None:
    folder = load_base(shared_reference)  # it holds unet/, time_vae/ and scheduler/
    assert_same(base, folder)
    assert base.sha256 == folder.sha256 and len(base.sha256) == 64
    assert (base.name, base.norm_groups, base.encoder_time, base.prompt) == ("sd_original", 32, {}, None)
    assert not any("time_emb" in key for key in base.encoder)


def test_the_networks_give_the_recorded_numbers(base: Base, shared_reference: Path) -> None:
    expected = load_file(shared_reference / "base_S64.safetensors")
    recorded = load_file(shared_reference / "infer_S64_96x160.safetensors")
    with torch.no_grad():
        for timestep in (1, 999):
            z, steps = recorded["t500.mode.z"], torch.tensor([timestep])
            prediction = base.unet(z, steps, recorded["prompt_embeds"], return_dict=False)[0]
            assert (prediction - expected[f"96x160.t{timestep}.unet_base"]).abs().max() <= 1e-4
        picture = base.decoder(recorded["t500.mode.x0"])
    assert (picture - recorded["t500.mode.dec_unclamped"]).abs().max() <= 1e-4


def test_everything_is_frozen_and_float32(base: Base, shared_reference: Path, tmp_path: Path) -> None:
    state = load_file(shared_reference / "sd_original.safetensors")
    save_file({key: tensor.half() for key, tensor in state.items()}, tmp_path / "half.safetensors")
    half = load_base(tmp_path / "half.safetensors")
    assert half.sha256 != base.sha256
    for network in (half.unet, half.decoder):
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    assert {tensor.dtype for tensor in half.encoder.values()} == {torch.float32}


def test_a_self_contained_weights_file_is_a_base_with_its_time_layers(
    student: MiniStudent, mini_weights: TadsrWeights, tmp_path: Path
) -> None:
    path = tmp_path / "mini.safetensors"
    save(path, mini_weights)
    base = load_base(path)
    assert base.name == "tadsr-mini" and base.norm_groups == VAE_NORM_GROUPS
    assert base.prompt is not None and torch.equal(base.prompt, student.prompt)
    assert base.encoder_time and all(is_time_layer(key) for key in base.encoder_time)
    encoder = TimeAwareEncoder(EncoderConfig.from_state_dict(base.encoder, base.norm_groups))
    encoder.load_state_dict(base.encoder | base.encoder_time)
    image, x0, steps = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        assert_nearly(encoder(image, steps), student.encoder(image, steps))
        assert_nearly(base.decoder(x0), student.decode(x0))
        prediction = base.unet(x0, steps, student.prompt, return_dict=False)[0]
        assert_nearly(prediction, student.unet(x0, steps, student.prompt, return_dict=False)[0])


def test_the_time_layers_of_a_file_with_adapters_are_not_the_base_s(tmp_path: Path) -> None:
    checkpoint = sd_checkpoint()
    weights = replace(adapters_for(checkpoint), base=checkpoint)
    save(tmp_path / "whole.safetensors", weights)
    save_file(checkpoint, tmp_path / "sd.safetensors")
    whole, plain = load_base(tmp_path / "whole.safetensors"), load_base(tmp_path / "sd.safetensors")
    assert_same(whole, plain)
    assert whole.encoder_time == {} and whole.sha256 == plain.sha256


def test_norm_groups_come_from_the_metadata_of_a_single_file(mini: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.safetensors"
    save_file(mini, path, {"tadsr.vae_norm_groups": str(VAE_NORM_GROUPS)})
    base = load_base(path)
    assert base.norm_groups == VAE_NORM_GROUPS
    groups = {m.num_groups for m in base.decoder.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {VAE_NORM_GROUPS}
    save_file(mini, path, {"tadsr.vae_norm_groups": "four"})
    with pytest.raises(WeightsError, match="vae_norm_groups is 'four'"):
        load_base(path)


def test_checkpointing_the_decoder_changes_no_gradient(mini: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(mini, tmp_path / "mini.safetensors", {"tadsr.vae_norm_groups": str(VAE_NORM_GROUPS)})
    decoder = load_base(tmp_path / "mini.safetensors").decoder
    kept = _kept_bytes(decoder)
    decoder.enable_checkpointing()
    checkpointed = _kept_bytes(decoder)
    assert_nearly(kept[0], checkpointed[0])
    assert checkpointed[1] < 0.5 * kept[1], "the decoder still keeps its activations"


def _kept_bytes(decoder: LatentDecoder) -> tuple[Tensor, int]:
    """Returns the gradient of the latent, and how many bytes were kept for it."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    x0 = torch.full((1, 4, 8, 8), LATENT_SCALE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = decoder(x0).square().mean()
    loss.backward()
    assert x0.grad is not None
    return x0.grad, sum(sizes)


def _as_conv(state: dict[str, Tensor]) -> None:
    key = next(key for key in state if key.endswith(".proj_in.weight"))
    state[key] = state[key][:, :, None, None]


def _drop(state: dict[str, Tensor], prefix: str) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


NOT_A_BASE: dict[str, tuple[Change, str]] = {
    "SD 1.x": (_as_conv, "seems to be Stable Diffusion 1.x"),
    "SDXL": (lambda s: s.update({f"{UNET}label_emb.0.0.weight": torch.zeros(1)}), "seems to be Stable Diffusion XL"),
    "inpainting": (
        lambda s: s.update({f"{UNET}input_blocks.0.0.weight": torch.zeros(96, 9, 3, 3)}),
        "takes 9 channels, so it seems to be an inpainting model",
    ),
    "another architecture": (lambda s: _drop(s, f"{UNET}input_blocks"), "no UNet of the Stable Diffusion kind"),
    "no VAE": (lambda s: _drop(s, VAE), "no VAE encoder"),
    "no decoder": (lambda s: _drop(s, f"{VAE}decoder."), "no VAE decoder"),
    "a missing tensor": (lambda s: s.pop(f"{UNET}out.2.bias"), "UNet: of .* 1 missing"),
    "a tensor of another shape": (
        lambda s: s.update({f"{UNET}out.0.weight": torch.zeros(7)}),
        r"conv_norm_out.weight is \(7,\)",
    ),
    "a missing end of the encoder": (lambda s: s.pop(f"{VAE}encoder.conv_out.weight"), "encoder.conv_out.weight"),
}


@pytest.mark.parametrize("fault", NOT_A_BASE)
def test_what_is_no_base_is_named(mini: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    change, message = NOT_A_BASE[fault]
    state = dict(mini)
    change(state)
    path = tmp_path / "other.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, {"tadsr.vae_norm_groups": "4"})
    with pytest.raises(WeightsError, match=message) as caught:
        load_base(path)
    assert "other.safetensors" in str(caught.value)


def test_a_weights_file_without_its_base_is_no_base(tmp_path: Path) -> None:
    weights = adapters_for(sd_checkpoint())
    save(tmp_path / "adapters.safetensors", weights)
    with pytest.raises(WeightsError, match="without its base model .* init_weights"):
        load_base(tmp_path / "adapters.safetensors")


def test_folders_that_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(WeightsError, match="v_prediction, as of Stable Diffusion 2.1 for 768"):
        load_base(tmp_path)
    config.write_text(json.dumps({"prediction_type": "epsilon"}))
    with pytest.raises(WeightsError, match="needs unet/"):
        load_base(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"addition_embed_type": "text_time"}))
    with pytest.raises(WeightsError, match="seems to be Stable Diffusion XL"):
        load_base(tmp_path)


def test_a_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load_base(tmp_path / "none.safetensors")
    (tmp_path / "page.safetensors").write_bytes(b"<html></html>")
    with pytest.raises(WeightsError, match="a web page"):
        load_base(tmp_path / "page.safetensors")
