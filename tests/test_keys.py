"""Key tables: equal to the official names, invertible, and right for small networks too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from host import torch_import_shim
from tadsr.architecture import UNetLayout
from tadsr.errors import WeightsError
from tadsr.keys import (
    diffusers_unet_to_ldm,
    diffusers_vae_to_ldm,
    inverse,
    ldm_unet_to_diffusers,
    ldm_vae_to_diffusers,
    rename,
    unet_table,
    vae_table_of,
)

MINI = UNetLayout(3, 1, (True, False, False))


@pytest.fixture(scope="module")
def official(shared_reference: Path) -> dict[str, dict[str, str]]:
    return json.loads((shared_reference / "diffusers_to_original.json").read_text())


def test_unet_names_are_those_of_the_official_checkpoints(official: dict[str, dict[str, str]]) -> None:
    names = official["unet"]
    table = unet_table(UNetLayout.from_diffusers(names))
    assert {key: rename(key, table) for key in names} == names
    assert {rename(key, inverse(table)): key for key in names.values()} == names


def test_vae_names_are_those_of_the_official_checkpoints(official: dict[str, dict[str, str]]) -> None:
    names = official["vae"]
    table = vae_table_of(names)
    assert {key: rename(key, table) for key in names} == names
    assert {rename(key, inverse(table)): key for key in names.values()} == names


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_layouts_are_read_equally_from_both_kinds_of_names(official: dict[str, dict[str, str]], kind: str) -> None:
    names = official[kind]
    if kind == "unet":
        assert UNetLayout.from_diffusers(names) == UNetLayout.from_ldm(names.values())
    else:
        assert vae_table_of(names) == vae_table_of(names.values())


@pytest.mark.parametrize(
    ("layout", "module", "expected"),
    [  # hand-counted block numbers of networks that are not SD 2.1
        (
            MINI,
            "down_blocks.2.attentions.0.proj_in",
            "input_blocks.5.1.proj_in",
        ),
        (MINI, "down_blocks.1.downsamplers.0.conv", "input_blocks.4.0.op"),
        (MINI, "up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
        (MINI, "up_blocks.1.upsamplers.0.conv", "output_blocks.3.1.conv"),
        (
            MINI,
            "up_blocks.2.resnets.1.conv2",
            "output_blocks.5.0.out_layers.3",
        ),
        (UNetLayout(2, 3, (False, True)), "up_blocks.1.attentions.3.norm", "output_blocks.7.1.norm"),
        (UNetLayout(1, 2, (True,)), "up_blocks.0.resnets.2.norm1", "output_blocks.2.0.in_layers.0"),
    ],
)
def test_block_numbers_of_small_unets(layout: UNetLayout, module: str, expected: str) -> None:
    assert rename(module, unet_table(layout)) == expected
    assert rename(expected, inverse(unet_table(layout))) == module


def test_a_mini_unet_and_vae_survive_the_round_trip() -> None:
    torch_import_shim.install()
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (training only)")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=16,
        use_linear_projection=True,
    ).state_dict()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).state_dict()
    _assert_equal(ldm_unet_to_diffusers(diffusers_unet_to_ldm(unet)), unet)
    _assert_equal(ldm_vae_to_diffusers(diffusers_vae_to_ldm(vae)), vae)
    decoder = {key: tensor for key, tensor in vae.items() if key.startswith("decoder.")}
    _assert_equal(ldm_vae_to_diffusers(diffusers_vae_to_ldm(decoder)), decoder)


def test_vae_attention_becomes_a_convolution_under_both_of_its_diffusers_names() -> None:
    weight = torch.randn(8, 8)
    for name in ("to_out.0", "proj_attn"):
        state = {f"encoder.mid_block.attentions.0.{name}.weight": weight}
        converted = diffusers_vae_to_ldm(state)
        assert converted["encoder.mid.attn_1.proj_out.weight"].shape == (8, 8, 1, 1)


def test_a_foreign_key_is_an_error_that_names_it() -> None:
    with pytest.raises(WeightsError, match=r"text_model\.embeddings\.weight"):
        diffusers_unet_to_ldm({"text_model.embeddings.weight": torch.zeros(1)})


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
