"""The converter: uses every tensor of the official file, refuses everything else, and never executes a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import assert_equal

from tadsr.convert import LICENSE_NOTICE, OFFICIAL_TIMESTEPS, convert_official, main
from tadsr.errors import WeightsError
from tadsr.lora import adapters
from tadsr.releases import weights_from_official
from tadsr.weights import encoder_state_dict, load, save, unet_state_dict


@pytest.fixture(scope="module")
def pkl(shared_reference: Path) -> Path:
    return shared_reference / "tadsr.pkl"


@pytest.fixture
def official(pkl: Path) -> dict[str, Any]:
    return torch.load(pkl, map_location="cpu", weights_only=True)


def test_convert_save_load_round_trip(pkl: Path, tmp_path: Path) -> None:
    weights = convert_official(pkl)
    save(tmp_path / "tadsr.safetensors", weights)
    assert_equal(load(tmp_path / "tadsr.safetensors"), weights)
    assert weights.metadata.source_sha256 == hashlib.sha256(pkl.read_bytes()).hexdigest()
    assert (weights.metadata.rank, weights.metadata.encoder_rank, weights.metadata.alpha) == (4, 4, 8.0)
    assert "non-commercial" in weights.metadata.license


def test_every_tensor_of_the_official_file_is_in_the_result_once(pkl: Path, official: dict[str, Any]) -> None:
    weights = convert_official(pkl)
    before = [t for part, content in official.items() if part.startswith("state_dict") for t in content.values()]
    after = [t for section in (weights.unet_lora, weights.encoder_lora) for k, t in section.items() if "alpha" not in k]
    after += [*weights.unet_full.values(), *weights.encoder_time.values()]
    assert sorted(map(fingerprint, before)) == sorted(map(fingerprint, after))


def fingerprint(tensor: torch.Tensor) -> tuple[tuple[int, ...], float]:
    return tuple(tensor.shape), tensor.double().sum().item()


def test_scale_is_two_everywhere(pkl: Path) -> None:
    weights = convert_official(pkl)
    found = [*adapters(weights.unet_lora).values(), *adapters(weights.encoder_lora).values()]
    assert len(found) == 257 + 31 and {adapter.scale for adapter in found} == {2.0}


def test_merged_weights_follow_the_formula_under_the_official_names(
    shared_reference: Path, official: dict[str, Any]
) -> None:
    """W + 2 (B @ A), computed here from the official file and the diffusers folders, for every adapted module."""
    names = json.loads((shared_reference / "diffusers_to_original.json").read_text())
    original = load_file(shared_reference / "sd_original.safetensors")
    weights = convert_official(shared_reference / "tadsr.pkl", shared_reference / "sd_original.safetensors")
    unet = unet_state_dict(weights, weights.base_unet)
    encoder = encoder_state_dict(weights, weights.base_vae)
    for part, result, prefix, here in (
        ("unet", unet, "model.diffusion_model.", "diffusion_model."),
        ("vae", encoder, "first_stage_model.", ""),
    ):
        state, checked = official[f"state_dict_{part}"], 0
        for key, a in state.items():
            if ".lora_A." not in key:
                continue
            module = key.partition(".lora_A.")[0]
            name = names[part][f"{module}.weight"]
            base = state["conv_in.base_layer.weight"] if module == "conv_in" else original[prefix + name]
            b = state[key.replace(".lora_A.", ".lora_B.")]
            expected = base + 2 * (b.flatten(1) @ a.flatten(1)).reshape(base.shape)
            assert torch.allclose(result[here + name], expected, atol=1e-6), name
            checked += 1
        assert checked == {"unet": 257, "vae": 31}[part]
    assert torch.equal(
        unet["diffusion_model.input_blocks.0.0.bias"], official["state_dict_unet"]["conv_in.base_layer.bias"]
    )


def test_the_official_checkpoint_of_full_size_converts(shared_reference: Path) -> None:
    content = json.loads((shared_reference / "official_checkpoint_keys_full_size.json").read_text())
    full = {k: {n: torch.zeros(s) for n, s in v.items()} if isinstance(v, dict) else v for k, v in content.items()}
    weights = weights_from_official(full)
    number = sum(len(v) for v in full.values() if isinstance(v, dict))
    adapted = len(adapters(weights.unet_lora)) + len(adapters(weights.encoder_lora))
    assert number == 606
    assert 2 * adapted + len(weights.unet_full) + len(weights.encoder_time) == 606
    # Parameter counts of the released weights, conv_in in full included
    assert sum(t.numel() for k, t in weights.unet_lora.items() if "alpha" not in k) + 11_840 == 4_067_552
    assert sum(t.numel() for k, t in weights.encoder_lora.items() if "alpha" not in k) == 369_356
    assert sum(t.numel() for t in weights.encoder_time.values()) == 2_072_576


def test_timesteps_are_the_fifty_of_the_official_training() -> None:
    assert len(OFFICIAL_TIMESTEPS) == 50
    assert OFFICIAL_TIMESTEPS[:4] == (1, 21, 41, 62) and OFFICIAL_TIMESTEPS[-2:] == (978, 999)


def test_a_base_may_be_a_checkpoint_or_a_diffusers_folder(shared_reference: Path, pkl: Path, tmp_path: Path) -> None:
    from_file = convert_official(pkl, shared_reference / "sd_original.safetensors")
    from_folder = convert_official(pkl, shared_reference)  # it has unet/ and time_vae/
    assert from_file.is_self_contained
    assert_equal(from_file, from_folder)
    save(tmp_path / "whole.safetensors", from_file)
    assert_equal(load(tmp_path / "whole.safetensors"), from_file)


def test_a_base_in_a_pickle_or_in_shards(shared_reference: Path, pkl: Path, tmp_path: Path) -> None:
    state = load_file(shared_reference / "sd_original.safetensors")
    expected = convert_official(pkl, shared_reference)
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "sd.ckpt")
    assert_equal(convert_official(pkl, tmp_path / "sd.ckpt"), expected)
    folder = tmp_path / "diffusers"
    shutil.copytree(shared_reference / "time_vae", folder / "vae")
    unet = load_file(shared_reference / "unet" / "diffusion_pytorch_model.safetensors")
    keys = sorted(unet)
    (folder / "unet").mkdir()
    for i, part in enumerate((keys[:300], keys[300:]), start=1):
        name = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({key: unet[key] for key in part}, folder / "unet" / name)
    assert_equal(convert_official(pkl, folder), expected)


LEFT_OVER = {
    "a UNet tensor": (lambda c: c["state_dict_unet"].update({"conv_in.extra": torch.zeros(1)}), "conv_in.extra"),
    "an unknown adapter": (
        lambda c: c["state_dict_unet"].update({"conv_in.lora_A.default_new.weight": torch.zeros(4, 4, 3, 3)}),
        "default_new",
    ),
    "half a pair": (
        lambda c: c["state_dict_unet"].pop("conv_out.lora_B.default_decoder.weight"),
        "1 missing .*conv_out.lora_B",
    ),
    "a VAE tensor": (lambda c: c["state_dict_vae"].update({"decoder.x": torch.zeros(1)}), "decoder.x"),
    "a time tensor": (lambda c: c["state_dict_vae_time"].update({"encoder.time.x": torch.zeros(1)}), "encoder.time.x"),
    "a lost time tensor": (
        lambda c: c["state_dict_vae_time"].pop("encoder.mid_block.resnets.1.time_emb_proj.bias"),
        r"1 missing .*mid.block_2.time_emb_proj.bias",
    ),
    "an unknown part": (lambda c: c.update(state_dict_ema={}), "1 unexpected .*state_dict_ema"),
    "a lost part": (lambda c: c.pop("state_dict_vae"), "1 missing .*state_dict_vae"),
    "a wrong rank": (lambda c: c.update(rank_unet=8), "rank 8"),
    "a module not in the lists": (
        lambda c: c["unet_lora_others_modules"].pop(),
        "unet_lora_others_modules.*1 unexpected",
    ),
}


@pytest.mark.parametrize("fault", LEFT_OVER)
def test_nothing_is_left_over_or_missing_in_silence(fault: str, official: dict[str, Any], tmp_path: Path) -> None:
    change, message = LEFT_OVER[fault]
    change(official)
    torch.save(official, tmp_path / "changed.pkl")
    with pytest.raises(WeightsError, match=message) as caught:
        convert_official(tmp_path / "changed.pkl")
    assert "changed.pkl" in str(caught.value)


def test_another_rank_gives_another_scale(official: dict[str, Any]) -> None:
    for part in ("unet", "vae"):
        official[f"rank_{part}"] = 2
        state = official[f"state_dict_{part}"]
        for key in state:
            if ".lora_" in key:
                state[key] = state[key][:2] if ".lora_A." in key else state[key][:, :2]
    weights = weights_from_official(official)
    assert {adapter.scale for adapter in adapters(weights.unet_lora).values()} == {4.0}


def test_a_base_of_other_sizes_names_the_module_and_both_shapes(
    pkl: Path, shared_reference: Path, tmp_path: Path
) -> None:
    state = load_file(shared_reference / "sd_original.safetensors")
    key = "model.diffusion_model.input_blocks.4.0.in_layers.2.weight"
    state[key] = torch.zeros(256, 128, 3, 3)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors.*input_blocks\.4\.0\.in_layers\.2.*\(256, 128, 3, 3\)"):
        convert_official(pkl, tmp_path / "other.safetensors")


class Touch:
    """What a malicious pickle is: an object whose unpickling calls a function, here one that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "os.system", "beside the tensors"])
def test_a_malicious_pickle_is_refused_and_not_executed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, path, output = tmp_path / "executed", tmp_path / "tadsr.pkl", tmp_path / "out.safetensors"
    evil: Any = Touch(victim)
    if kind == "os.system":
        evil = type("Shell", (), {"__reduce__": lambda _: (os.system, (f"echo > {victim}",))})()
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif kind == "beside the tensors":
        torch.save({**request.getfixturevalue("official"), "rank_unet": evil}, path)
    else:
        torch.save({"state_dict_unet": evil}, path, _use_new_zipfile_serialization=kind != "legacy")
    assert main([str(path), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert not victim.exists() and not output.exists()
    assert "holds code" in error and "nothing in it was executed" in error and str(path) in error
    assert error.count("\n") == 1 and "weights_only" not in error, "one line, without advice to load it unsafely"


def test_the_malicious_pickle_of_these_tests_is_malicious(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50), pickle.dumps([1], protocol=2)])
def test_a_damaged_pickle_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tadsr.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        convert_official(path)


def test_a_truncated_pickle_is_one_clear_error(pkl: Path, tmp_path: Path) -> None:
    path = tmp_path / "tadsr.pkl"
    path.write_bytes(pkl.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match="damaged, incomplete"):
        convert_official(path)


@pytest.mark.parametrize("base", ["missing", "folder", "tadsr"])
def test_a_base_that_is_none_is_one_clear_error(base: str, pkl: Path, tmp_path: Path) -> None:
    path = tmp_path / base
    if base == "folder":
        path.mkdir()
    if base == "tadsr":
        save_file({"conditioner.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        convert_official(pkl, path)


def test_the_command_says_what_it_did(pkl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"embedding": torch.ones(77, 64)}, tmp_path / "prompt.safetensors")
    output = tmp_path / "new folder" / "tadsr.safetensors"
    assert main([str(pkl), "-o", str(output), "--prompt-embedding", str(tmp_path / "prompt.safetensors")]) == 0
    text = capsys.readouterr().out
    for part in (LICENSE_NOTICE, "257 adapters of rank 4", hashlib.sha256(pkl.read_bytes()).hexdigest(), str(output)):
        assert part in text
    prompt = load(output).prompt
    assert prompt is not None and prompt.shape == (1, 77, 64)


def test_a_prompt_embedding_of_another_width_is_refused(
    pkl: Path, shared_reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(OrderedDict(embedding=torch.ones(1, 77, 1024)), tmp_path / "prompt.safetensors")
    arguments = [str(pkl), "-o", str(tmp_path / "o.safetensors"), "--base", str(shared_reference)]
    assert main([*arguments, "--prompt-embedding", str(tmp_path / "prompt.safetensors")]) == 1
    assert "width 1024" in capsys.readouterr().err
