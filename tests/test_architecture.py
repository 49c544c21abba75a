"""Sizes and time layers told from names and shapes; a number in a name builds nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tadsr.architecture import (
    MAX_LAYERS,
    MAX_LEVELS,
    UNetLayout,
    VaeHalf,
    count,
    is_time_layer,
    shapes_of,
    time_layer_keys,
    vae_layout,
)
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.errors import WeightsError
from tadsr.keys import vae_table_of
from tests.tiny_weights import ENCODER

SMALL = EncoderConfig(channels=(64, 96, 128), layers_per_level=1, mid_attention=False)


@pytest.mark.parametrize("config", [ENCODER, SMALL, EncoderConfig()])
def test_sizes_and_time_layers_are_those_of_the_encoder_that_has_the_tensors(config: EncoderConfig) -> None:
    state = TimeAwareEncoder(config, device="meta").state_dict()
    assert VaeHalf.of_encoder(shapes_of(state)) == VaeHalf(
        in_channels=config.in_channels,
        out_channels=2 * config.latent_channels,
        channels=config.channels,
        blocks=config.layers_per_level,
        mid_attention=config.mid_attention,
    )
    levels, layers = vae_layout(state)
    assert (levels, layers) == (len(config.channels), config.layers_per_level)
    assert {key for key in state if is_time_layer(key)} == time_layer_keys(levels, layers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.time_embedding.linear_1.weight", True),
        ("encoder.time_embedding", True),
        ("time_embedding.linear_2", True),  # of a diffusers UNet
        ("encoder.down.0.block.1.time_emb_proj.bias", True),
        ("down_blocks.0.resnets.0.time_emb_proj", True),
        ("encoder.mid.block_1.norm2.weight", False),
        ("encoder.mid.my_time_emb_proj_2.weight", False),
    ],
)
def test_a_time_layer_is_known_by_its_name(name: str, expected: bool) -> None:
    assert is_time_layer(name) is expected


def test_numbers_are_counted_from_the_start_of_a_name() -> None:
    names = ["down.0.a", "down.2.a", "up.7.down.9.a"]
    assert count(names, r"down\.(\d+)\.", MAX_LEVELS) == 3
    assert count(["down.0000000015.a"], r"down\.(\d+)\.", MAX_LEVELS) == 16


HUGE = ("16", "3000", "9" * 5000)  # Python turns no text of more than 4,300 digits into a number


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    ("read", "names"),
    [
        (vae_table_of, "encoder.down.{}.block.{}.time_emb_proj.weight"),
        (vae_table_of, "decoder.up_blocks.{}.resnets.{}.conv1.weight"),
        (UNetLayout.from_diffusers, "down_blocks.{}.resnets.{}.conv1.weight"),
        (VaeHalf.of_encoder, "encoder.down.{}.block.{}.conv1.weight"),
        (VaeHalf.of_decoder, "decoder.up.{}.block.{}.conv1.weight"),
    ],
)
def test_a_number_that_no_network_has_builds_nothing(
    read: Callable[[dict[str, tuple[int, ...]]], object], names: str, number: str
) -> None:
    started = time.process_time()
    with pytest.raises(WeightsError, match=re.escape(f"is number {number[:20]} in its row") + ".* up to 16 are"):
        read({names.format(number, number): (1, 1, 1, 1)})
    assert time.process_time() - started < 1.0


def test_a_unet_of_too_many_blocks_is_refused() -> None:
    with pytest.raises(WeightsError, match="of 1 levels and 98 layers"):
        UNetLayout.from_ldm({"input_blocks.98.0.in_layers.0.weight"})
    with pytest.raises(WeightsError, match=r"of 31 levels"):
        UNetLayout.from_ldm({f"input_blocks.{i}.0.op.weight" for i in range(1, 31)})
    with pytest.raises(WeightsError, match=r"is number 99999 in its row"):
        UNetLayout.from_ldm({"input_blocks.99999.0.op.weight"})


def test_layers_are_limited_as_levels_are() -> None:
    with pytest.raises(WeightsError, match=f"up to {MAX_LAYERS} are accepted"):
        vae_table_of({"encoder.down.0.block.64.conv1.weight"})
