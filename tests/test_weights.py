"""The weights file: round trips, and one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_weights
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tadsr.convert import main
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.lora import merge
from tadsr.weights import (
    SECTIONS,
    TadsrWeights,
    WeightsError,
    check_against_base,
    encoder_state_dict,
    load,
    read_metadata,
    save,
    unet_state_dict,
)

MAKERS = {"adapters": tiny_weights.adapters_only, "self-contained": tiny_weights.self_contained}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weights with spaces é.safetensors"
    save(path, tiny_weights.adapters_only())
    return path


def assert_equal(a: TadsrWeights, b: TadsrWeights) -> None:
    assert a.metadata == b.metadata
    ours, theirs = all_tensors(a), all_tensors(b)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


def all_tensors(weights: TadsrWeights) -> dict[tuple[str, str], torch.Tensor]:
    tensors = {(name, key): t for name in SECTIONS for key, t in getattr(weights, name).items()}
    return tensors if weights.prompt is None else tensors | {("prompt", ""): weights.prompt}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    weights = MAKERS[kind]()
    path = tmp_path / "w.safetensors"
    save(path, weights)
    assert_equal(load(path), weights)
    assert read_metadata(path) == weights.metadata
    assert load(path).is_self_contained == (kind == "self-contained")


def test_half_precision_stays(tmp_path: Path) -> None:
    weights = tiny_weights.self_contained()
    weights = replace(weights, base={key: tensor.half() for key, tensor in weights.base.items()})
    save(tmp_path / "w.safetensors", weights)
    assert_equal(load(tmp_path / "w.safetensors"), weights)


def test_saving_replaces_whole_files_and_leaves_nothing_behind(saved: Path) -> None:
    before = saved.read_bytes()
    broken = tiny_weights.adapters_only()
    broken.encoder_time.popitem()
    with pytest.raises(WeightsError):
        save(saved, broken)
    assert saved.read_bytes() == before
    save(saved, tiny_weights.self_contained())
    assert load(saved).is_self_contained
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_file_can_be_read_by_whom_the_umask_lets(saved: Path) -> None:
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Changes tensors and metadata of a file as `change` does, without the checks of `save`."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, header)


WRONG_TENSORS = {
    "lost half of a LoRA": (
        lambda t: t.pop("unet_lora.diffusion_model.out.2.lora_up.weight"),
        r"1 missing \(diffusion_model\.out\.2\.lora_up\.weight\)",
    ),
    "lost a whole LoRA": (
        lambda t: [
            t.pop(f"encoder_lora.quant_conv.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha")
        ],
        r"'encoder_lora': 6.*written with.*'encoder_lora': 9",
    ),
    "lost a time layer": (
        lambda t: t.pop("encoder_time.encoder.down.1.block.0.time_emb_proj.bias"),
        r"1 missing \(encoder\.down\.1\.block\.0\.time_emb_proj\.bias\)",
    ),
    "an unknown section": (lambda t: t.update({"extra.thing": torch.zeros(1)}), r"1 unexpected \(extra\.thing\)"),
    "an unknown key": (
        lambda t: t.update({"encoder_time.encoder.up.weight": torch.zeros(1)}),
        r"1 unexpected \(encoder\.up\.weight\)",
    ),
    "not a number": (
        lambda t: t.update({"unet_full.diffusion_model.input_blocks.0.0.bias": torch.full((32,), torch.nan)}),
        r"input_blocks\.0\.0\.bias holds NaN",
    ),
    "whole numbers": (
        lambda t: t.update({key: tensor.to(torch.int8) for key, tensor in t.items()}),
        r"is of the type torch\.int8; accepted are float",
    ),
    "no number in the prompt": (lambda t: t.update({"prompt": torch.full((1, 8, 16), torch.nan)}), "prompt holds NaN"),
    "a prompt of the wrong shape": (lambda t: t.update({"prompt": torch.zeros(8, 16)}), r"prompt has shape \(8, 16\)"),
}


@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_wrong_tensors_are_named(fault: str, saved: Path) -> None:
    change, message = WRONG_TENSORS[fault]

    def apply(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        change(tensors)
        if fault != "lost a whole LoRA":  # that one is found by the counts only
            counts: dict[str, int] = {}
            for key in tensors:
                counts[key.partition(".")[0]] = counts.get(key.partition(".")[0], 0) + 1
            header["tadsr.tensors"] = json.dumps(counts)

    rewrite(saved, apply)
    with pytest.raises(WeightsError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format_version=99), "format version is 99; this pack reads 1"),
        (lambda meta: meta.pop("format_version"), "no readable field"),
        (lambda meta: meta.update(surprise=1), "surprise"),
        (lambda meta: meta.update(vae_norm_groups="4"), "vae_norm_groups='4'; accepted is"),
        (lambda meta: meta.update(vae_norm_groups=0), "vae_norm_groups=0; accepted is a number from 1"),
        (lambda meta: meta.update(timesteps=[1, 500.5]), r"the timestep '500\.5'; accepted are integers"),
        (lambda meta: meta.update(alpha=float("nan")), "alpha=nan; accepted is a finite number"),
    ],
)
def test_wrong_metadata_is_an_error(change: Callable[[dict[str, object]], object], message: str, saved: Path) -> None:
    def apply(_: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        meta = json.loads(header["tadsr"])
        change(meta)
        header["tadsr"] = json.dumps(meta)

    rewrite(saved, apply)
    with pytest.raises(WeightsError, match=message):
        load(saved)


def test_groups_that_do_not_divide_the_bases_channels(tmp_path: Path) -> None:
    weights = tiny_weights.self_contained()
    with pytest.raises(WeightsError, match="do not go into 5 groups; accepted as vae_norm_groups are divisors"):
        save(tmp_path / "w.safetensors", replace(weights, metadata=replace(weights.metadata, vae_norm_groups=5)))


def test_a_key_of_two_lines_is_told_in_one(saved: Path) -> None:
    rewrite(saved, lambda tensors, _: tensors.update({"extra.two\nlines": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="extra.two lines"):
        load(saved)


def flip_a_bit(path: Path) -> None:
    """Among the numbers, where nothing else tells it."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_told(saved: Path) -> None:
    flip_a_bit(saved)
    with pytest.raises(WeightsError, match="its numbers are not those that were written") as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_a_large_file_is_compared_with_its_digest_on_request(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tadsr.weights.ALWAYS_CHECKED_BYTES", 0)
    assert_equal(load(saved, check_digest=True), tiny_weights.adapters_only())
    assert main(["--check", str(saved)]) == 0
    assert "Whole: all numbers are those that were written" in capsys.readouterr().out
    flip_a_bit(saved)
    load(saved)
    with pytest.raises(WeightsError, match="its numbers are not those that were written"):
        load(saved, check_digest=True)
    assert main(["--check", str(saved)]) == 1
    assert "Not whole" in capsys.readouterr().err


def test_lost_metadata_is_an_error(saved: Path) -> None:
    save_file(load_file(saved), saved)
    with pytest.raises(WeightsError, match="convert it again"):
        load(saved)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 5000, -1])
def test_a_truncated_file_is_an_error_that_names_it(kept: int, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:kept])
    with pytest.raises(WeightsError) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    if kept in (5000, -1):
        assert "incomplete safetensors" in str(caught.value)
    if kept == -1:
        assert f"{len(content) - 1} of {len(content)} bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "PyTorch pickle.*tadsr.convert"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"hello", "not a safetensors file"),
    ],
)
def test_files_that_are_no_safetensors_are_told_apart(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.out.2.weight", "Stable Diffusion checkpoint.*models/checkpoints"),
        ("first_stage_model.quant_conv.weight", "Stable Diffusion checkpoint.*models/checkpoints"),
        ("lora_unet_mid_block.lora_up.weight", "LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("decoder.conv_in.weight", "a VAE"),
        ("something.else", "1 tensors: something.else"),
    ],
)
def test_other_safetensors_are_told_where_they_belong(key: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tadsr.safetensors"  # the name must not matter
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=message):
        load(path)
    with pytest.raises(WeightsError, match=message):
        read_metadata(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load(tmp_path / name)


def shapes() -> dict[str, torch.Size]:
    return {key: torch.Size(shape) for key, shape in tiny_weights.UNET_SHAPES.items()}


def test_the_right_base_passes() -> None:
    check_against_base(tiny_weights.adapters_only(), shapes())
    check_against_base(tiny_weights.self_contained(), shapes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"diffusion_model.out.2.weight": (4, 64, 3, 3)},
            r"out\.2 needs .*\(4, 32, 3, 3\), the base has \(4, 64, 3, 3\)",
        ),
        ({"diffusion_model.out.2.weight": None}, r"out\.2 .*no such module"),
        ({"diffusion_model.input_blocks.0.0.bias": (64,)}, r"input_blocks\.0\.0\.bias"),
    ],
)
def test_lora_of_another_base_names_the_module_and_both_shapes(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    other = shapes()
    for key, shape in change.items():
        other.pop(key) if shape is None else other.update({key: torch.Size(shape)})
    with pytest.raises(WeightsError, match=message):
        check_against_base(tiny_weights.adapters_only(), other)


def test_a_prompt_of_another_width_is_an_error() -> None:
    weights = replace(tiny_weights.adapters_only(), prompt=torch.zeros(1, 77, 1024))
    with pytest.raises(WeightsError, match="width 1024, the base's UNet takes 16"):
        check_against_base(weights, shapes())


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "first_stage_model.encoder.mid.block_1.norm1.bias",
        "first_stage_model.encoder.conv_in.weight",
    ],
)
def test_a_self_contained_file_has_a_whole_base(lost: str, tmp_path: Path) -> None:
    weights = tiny_weights.self_contained()
    del weights.base[lost]
    with pytest.raises(WeightsError, match=lost.removeprefix("first_stage_model.").replace(".", r"\.")):
        save(tmp_path / "w.safetensors", weights)


def test_encoder_state_dict_merges_once_and_loads_strictly() -> None:
    weights, vae = tiny_weights.adapters_only(), tiny_weights.base_vae()
    state = encoder_state_dict(weights, vae)
    encoder = TimeAwareEncoder(EncoderConfig.from_state_dict(state))
    encoder.load_state_dict(state, strict=True)
    lora = weights.encoder_lora
    for module in ("encoder.conv_in", "encoder.mid.attn_1.q", "quant_conv"):
        down, up = lora[f"{module}.lora_down.weight"], lora[f"{module}.lora_up.weight"]
        expected = merge(vae[f"{module}.weight"], down, up, 2.0)
        assert torch.equal(state[f"{module}.weight"], expected)
        assert not torch.equal(expected, vae[f"{module}.weight"])
    assert torch.equal(state["encoder.conv_in.bias"], vae["encoder.conv_in.bias"])
    time = "encoder.mid.block_2.time_emb_proj.weight"
    assert torch.equal(state[time], weights.encoder_time[time])


def test_encoder_state_dict_is_float32_for_a_half_precision_base() -> None:
    vae = {key: tensor.half() for key, tensor in tiny_weights.base_vae().items()}
    state = encoder_state_dict(tiny_weights.adapters_only(), vae)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_encoder_of_another_vae_is_an_error() -> None:
    other = TimeAwareEncoder(EncoderConfig(channels=(32, 32), layers_per_level=1)).state_dict()
    vae = {key: tensor for key, tensor in other.items() if "time_emb" not in key}
    with pytest.raises(WeightsError, match=r"time_emb_proj\.weight needs .*\(128, 256\), the base has \(64, 256\)"):
        encoder_state_dict(tiny_weights.adapters_only(), vae)
    with pytest.raises(WeightsError, match="no VAE encoder"):
        encoder_state_dict(tiny_weights.adapters_only(), {"decoder.conv_in.weight": torch.zeros(1)})


def test_unet_state_dict_replaces_first_and_merges_then() -> None:
    weights = tiny_weights.adapters_only()
    unet = {key: torch.zeros(shape) for key, shape in tiny_weights.UNET_SHAPES.items()}
    state = unet_state_dict(weights, unet)
    key = "diffusion_model.input_blocks.0.0"
    down, up = weights.unet_lora[f"{key}.lora_down.weight"], weights.unet_lora[f"{key}.lora_up.weight"]
    assert torch.equal(state[f"{key}.weight"], merge(weights.unet_full[f"{key}.weight"], down, up, 2.0))
    assert torch.equal(state[f"{key}.bias"], weights.unet_full[f"{key}.bias"])
