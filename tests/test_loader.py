"""Load TADSR Model: checkpoints, adapters, folders, and files that change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nearly import assert_nearly
from random_weights import adapters_for, sd_checkpoint, sd_unet, self_contained
from safetensors.torch import save_file
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import NO_BASE, load_pack, models_folder, picture
from host.server import link_pack
from tadsr.encoder import EncoderConfig, TimeAwareEncoder, mode
from tadsr.geometry import pad_to_multiple
from tadsr.keys import ldm_unet_to_diffusers
from tadsr.schedule import LATENT_SCALE, x0_from_residual
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, encoder_state_dict, save, unet_state_dict
from training.mini.networks import VAE_CHANNELS

MINI, ADAPTERS, CHECKPOINT = "loader-mini.safetensors", "loader-adapters.safetensors", "loader-sd.safetensors"
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def models(comfy_inprocess: InProcessComfy) -> Path:
    return models_folder(comfy_inprocess)


def test_adapters_on_a_checkpoint_give_the_merged_networks(comfy_inprocess: InProcessComfy, models: Path) -> None:
    checkpoint = sd_checkpoint()
    weights = adapters_for(checkpoint)
    save_file({key: tensor.half() for key, tensor in checkpoint.items()}, models / "checkpoints" / CHECKPOINT)
    save(models / "tadsr" / ADAPTERS, weights)
    pack = load_pack(comfy_inprocess, ADAPTERS, CHECKPOINT)
    with pytest.raises(ValueError, match="has no text encoder"):
        pack.clip.tokenize("a cat")
    assert not pack.model.patches, "the weights are merged: a patch would be computed again, and keep a copy"
    make, arguments = pack.model.cached_patcher_init
    again = make(*arguments, disable_dynamic=True).model.state_dict()
    for key, tensor in pack.model.model.state_dict().items():
        assert_nearly(again[key], tensor, key, within=2e-3)  # merged in half precision

    image, timestep = picture(16, 24), 300
    latent, enlarged = pack.encode(image, timestep)
    stored = {key: tensor.half().float() for key, tensor in checkpoint.items()}
    expected_latent, expected_x0 = reference_step(stored, weights, enlarged, timestep)
    assert_close("latent", latent["samples"], expected_latent)
    result = pack.one_step(latent)["samples"]
    assert_close("x0", result * LATENT_SCALE, expected_x0)
    assert pack.upscale(image, timestep).shape == (1, 64, 96, 3)

    core = comfy_inprocess.node("CheckpointLoaderSimple")().load_checkpoint(CHECKPOINT)[0]
    with pytest.raises(ValueError, match="without TADSR weights"):
        comfy_inprocess.node("TADSROneStep").execute(core, latent)


def reference_step(
    checkpoint: dict[str, Tensor], weights: Any, enlarged: Tensor, timestep: int
) -> tuple[Tensor, Tensor]:
    """Returns latent and x0 of merged networks in plain torch and diffusers."""
    vae = {k.removeprefix(BASE_VAE_PREFIX): t for k, t in checkpoint.items() if k.startswith(BASE_VAE_PREFIX)}
    encoder = TimeAwareEncoder(EncoderConfig()).eval()
    encoder.load_state_dict(encoder_state_dict(weights, vae))
    base = {k.removeprefix("model."): t for k, t in checkpoint.items() if k.startswith(BASE_UNET_PREFIX)}
    merged = {k.removeprefix("diffusion_model."): t for k, t in unet_state_dict(weights, base).items()}
    unet = sd_unet().eval()
    unet.load_state_dict(ldm_unet_to_diffusers(merged))
    padded, _ = pad_to_multiple(enlarged.movedim(-1, 1), encoder.downscale)
    latent = mode(encoder(padded * 2 - 1, torch.tensor([timestep])))
    z = latent * LATENT_SCALE
    return latent, x0_from_residual(z, unet(z, timestep, weights.prompt).sample, timestep)


def assert_close(what: str, ours: Tensor, expected: Tensor) -> None:
    error = float((ours - expected).abs().max() / expected.std())
    assert error < 2e-4, (
        f"{what} differs by {error:.1e} of its spread: a part of the weights is missing or applied twice"
    )


def test_the_pack_installed_twice_is_told(
    comfy_inprocess: InProcessComfy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nodes

    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))
    second = tmp_path / "tadsr-of-another-name"
    first = Path(comfy_inprocess.pack.__file__ or "").parent
    link_pack(second)
    load = partial(nodes.load_custom_node, module_parent="custom_nodes")
    with caplog.at_level("WARNING"):
        assert comfy_inprocess.loop.run_until_complete(load(str(second)))
    assert f"TADSR is installed twice, in {first} and in {second}" in caplog.text
    caplog.clear()
    assert comfy_inprocess.loop.run_until_complete(load(str(second)))  # the same again, as a reload
    assert "installed twice" not in caplog.text


def test_a_v_prediction_checkpoint_is_refused(comfy_inprocess: InProcessComfy, models: Path) -> None:
    import comfy.model_base

    save(models / "tadsr" / MINI, self_contained())
    base = load_pack(comfy_inprocess, MINI).model
    weights = comfy_inprocess.module("base").read_weights(str(models / "tadsr" / MINI))
    before = base.model.model_type
    base.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    try:
        with pytest.raises(ValueError, match="needs Stable Diffusion 2.1-base"):
            comfy_inprocess.module("student").make_student(base, weights, MINI)
    finally:
        base.model.model_type = before


def test_a_file_replaced_under_its_name_is_loaded_again(comfy_inprocess: InProcessComfy, models: Path) -> None:
    loader = comfy_inprocess.node("TADSRModelLoader")
    path = models / "tadsr" / "replaced.safetensors"
    save(path, self_contained(1))
    before = loader.fingerprint_inputs(path.name, NO_BASE)
    assert loader.fingerprint_inputs(path.name, NO_BASE) == before
    save(path, self_contained(2))
    assert loader.fingerprint_inputs(path.name, NO_BASE) != before


def test_a_base_replaced_under_its_name_is_loaded_again(comfy_inprocess: InProcessComfy, models: Path) -> None:
    loader = comfy_inprocess.node("TADSRModelLoader")
    save(models / "tadsr" / "kept.safetensors", self_contained())
    base = models / "checkpoints" / "replaced-base.safetensors"
    base.write_bytes(b"one")
    before = loader.fingerprint_inputs("kept.safetensors", base.name)
    assert loader.fingerprint_inputs("kept.safetensors", base.name) == before
    assert loader.fingerprint_inputs("kept.safetensors", NO_BASE) != before
    base.write_bytes(b"another")
    assert loader.fingerprint_inputs("kept.safetensors", base.name) != before


def test_weights_are_found_in_extra_model_paths(
    comfy_inprocess: InProcessComfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of a real start: the file is read before the pack is loaded."""
    import folder_paths
    from utils.extra_config import load_extra_path_config

    known = {k: v for k, v in folder_paths.folder_names_and_paths.items() if k != "tadsr"}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "extra.safetensors").touch()
    (tmp_path / "mine" / "notes.txt").touch()
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(f"mine:\n    base_path: {tmp_path}\n    tadsr: mine\n")
    load_extra_path_config(str(config))
    comfy_inprocess.module("folders").register_weights_folder()
    options = comfy_inprocess.node("TADSRModelLoader").GET_SCHEMA().inputs[0].options
    assert "extra.safetensors" in options and "notes.txt" not in options


@pytest.mark.parametrize("is_amd", [False, True])  # there ComfyUI counts 2.73 times as much
def test_the_vae_s_memory_is_comfyui_s_for_its_width_and_downscale(
    comfy_inprocess: InProcessComfy, models: Path, monkeypatch: pytest.MonkeyPatch, is_amd: bool
) -> None:
    import comfy.model_management as mm
    import comfy.sd

    def needed(vae: comfy.sd.VAE, downscale: int) -> list[float]:
        latent = (1, 4, 64 // downscale, 48 // downscale)
        return [vae.memory_used_encode((1, 3, 64, 48), torch.float16), vae.memory_used_decode(latent, torch.float16)]

    monkeypatch.setattr(mm, "is_amd", lambda: is_amd)
    save(models / "tadsr" / MINI, self_contained())
    sizes = {"double_z": True, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32}
    sizes |= {"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
    config = {"params": {"ddconfig": sizes, "embed_dim": 4}}
    of_sd = needed(comfy.sd.VAE(sd={}, config=config), 8)  # ComfyUI's formulas know no width: they are for SD's
    assert of_sd[0] == pytest.approx(1767 * 64 * 48 * 2 * (2.73 if is_amd else 1))
    share = VAE_CHANNELS[0] / 128
    assert needed(load_pack(comfy_inprocess, MINI).vae, 4) == pytest.approx([share * bytes for bytes in of_sd])


def test_a_processor_uses_torchs_attention_unless_another_was_chosen(
    comfy_inprocess: InProcessComfy, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.ldm.modules import attention

    save(models / "tadsr" / MINI, self_contained())
    calls: list[tuple[int, ...]] = []
    torchs = attention.attention_pytorch

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return torchs(q, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_pytorch", counted)
    latent, _ = load_pack(comfy_inprocess, MINI).encode(picture(24, 40))
    fast = load_pack(comfy_inprocess, MINI).one_step(latent)["samples"]
    assert calls, "the UNet's attention went another way"
    calls.clear()
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_split)  # as if started with the option
    usual = load_pack(comfy_inprocess, MINI).one_step(latent)["samples"]
    assert not calls
    assert_close("x0", fast, usual)
