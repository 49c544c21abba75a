"""Weights in the official layout: what the converter reads, written back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import self_contained
from tiny_weights import adapters_only
from torch import Tensor

from tadsr.convert import convert_official
from tadsr.errors import WeightsError
from tadsr.lora import adapters, merge
from tadsr.weights import save
from training.official import main, official_state, save_official


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_the_official_checkpoint_comes_back(shared_reference: Path, tmp_path: Path) -> None:
    source, path = shared_reference / "tadsr.pkl", tmp_path / "back.pkl"
    weights = convert_official(source)
    save_official(path, weights)
    expected, result = read(source), read(path)
    assert list(result) == list(expected)
    for name, part in expected.items():
        if isinstance(part, dict):
            assert_equal(result[name], part)
        elif isinstance(part, list):
            assert result[name] == list(dict.fromkeys(part)), name  # the official lists repeat names
        else:
            assert result[name] == part
    again = convert_official(path)
    for section in ("unet_lora", "unet_full", "encoder_lora", "encoder_time"):
        assert_equal(getattr(again, section), getattr(weights, section))
    assert list(tmp_path.iterdir()) == [path]


def test_another_alpha_goes_into_the_matrices(shared_reference: Path, tmp_path: Path) -> None:
    """The layout does not store alpha; readers take 8."""
    weights = convert_official(shared_reference / "tadsr.pkl")
    lora = {key: torch.tensor(3.0) if key.endswith(".alpha") else t for key, t in weights.unet_lora.items()}
    save_official(tmp_path / "alpha.pkl", replace(weights, unet_lora=lora))
    again = convert_official(tmp_path / "alpha.pkl")
    for module, adapter in adapters(lora).items():
        other, zero = adapters(again.unet_lora)[module], torch.zeros(adapter.weight_shape)
        expected = merge(zero, adapter.down, adapter.up, adapter.scale)
        assert torch.allclose(merge(zero, other.down, other.up, other.scale), expected, atol=1e-6), module


def test_weights_that_the_layout_cannot_hold(shared_reference: Path, tmp_path: Path) -> None:
    weights = convert_official(shared_reference / "tadsr.pkl")
    out = {"diffusion_model.out.2.bias": torch.zeros(4)}
    ranks = weights.encoder_lora | adapters_only().encoder_lora
    ranks |= {
        "quant_conv.lora_down.weight": torch.zeros(2, 8, 1, 1),
        "quant_conv.lora_up.weight": torch.zeros(8, 2, 1, 1),
    }
    for other, message in (
        (replace(weights, unet_full=weights.unet_full | out), "conv_out.bias was trained in full"),
        (replace(weights, encoder_lora=ranks), r"ranks \[2, 4\]"),
        (self_contained(), "0 adapters on the UNet and 0 on the encoder"),
    ):
        with pytest.raises(WeightsError, match=message):
            official_state(other)
        with pytest.raises(WeightsError):
            save_official(tmp_path / "none.pkl", other)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file_or_says_why_not(
    shared_reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "tadsr.safetensors", convert_official(shared_reference / "tadsr.pkl"))
    assert main([str(tmp_path / "tadsr.safetensors"), "-o", str(tmp_path / "back.pkl")]) == 0
    assert convert_official(tmp_path / "back.pkl").metadata.rank == 4
    assert main([str(tmp_path / "nowhere.safetensors"), "-o", str(tmp_path / "other.pkl")]) == 1
    assert "there is no such file" in capsys.readouterr().err and not (tmp_path / "other.pkl").exists()
