"""Writes weights in the layout of the official release: `python -m training.official WEIGHTS -o tadsr.pkl`.

The inverse of `tadsr.convert`. That layout holds the trained part only: no base, no prompt, no metadata.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadsr.architecture import UNetLayout
from tadsr.errors import WeightsError
from tadsr.keys import Table, inverse, rename, unet_table, vae_table_of
from tadsr.lora import Adapter, adapters
from tadsr.releases import MODULE_LISTS, OFFICIAL_ALPHA, PARTS, RANKS, VAE_ADAPTERS, VAE_MODULE_LIST
from tadsr.weights import UNET_PREFIX, TadsrWeights, load, validate
from training.data.storage import write_atomically

GROUPS = {  # first part of a UNet module's name: the adapter that the official code trains it in
    "conv_in": "default_encoder",
    "down_blocks": "default_encoder",
    "up_blocks": "default_decoder",
    "conv_out": "default_decoder",
    "mid_block": "default_others",
}
ENCODER_LINEAR = re.compile(r"encoder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)")  # linear layers in diffusers
FULL_KEY = re.compile(r"conv_in\.(weight|bias)")  # what the official layout can hold of the UNet in full


def save_official(path: Path, weights: TadsrWeights) -> None:
    """Writes the official pickle, whole or not at all; raises WeightsError if the weights do not fit its layout."""
    validate(weights)
    content = {name: _to_cpu(part) for name, part in official_state(weights).items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def official_state(weights: TadsrWeights) -> dict[str, Any]:
    """Returns the dict that the official checkpoint holds.

    An alpha other than the official 8, which the layout does not store, goes into the B matrices.
    """
    unet, encoder = _adapters(weights)
    unet_names = inverse(unet_table(UNetLayout.from_ldm(unet)))
    encoder_names = inverse(vae_table_of([*encoder, *weights.encoder_time]))
    unet = {rename(module, unet_names): adapter for module, adapter in unet.items()}
    encoder = {rename(module, encoder_names): adapter for module, adapter in encoder.items()}
    groups = {name: GROUPS[name.partition(".")[0]] for name in unet}
    lists = {name: [m for m in unet if groups[m] == group] for group, name in MODULE_LISTS.items()}
    unet_state = _full(weights.unet_full, unet_names)
    for module, adapter in unet.items():
        unet_state |= _lora(module, adapter, groups[module])
    vae_state: dict[str, Tensor] = {}
    for module, adapter in encoder.items():
        vae_state |= _lora(module, adapter, VAE_ADAPTERS[0])
    return {
        PARTS["time"]: {rename(key, encoder_names): tensor for key, tensor in weights.encoder_time.items()},
        VAE_MODULE_LIST: list(encoder),
        **lists,
        RANKS["unet"]: _rank(unet),
        RANKS["vae"]: _rank(encoder),
        PARTS["unet"]: unet_state,
        PARTS["vae"]: vae_state,
    }


def _adapters(weights: TadsrWeights) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Returns the adapters of UNet and encoder by ldm modules; raises WeightsError if one has none."""
    unet = {m.removeprefix(UNET_PREFIX): a for m, a in adapters(weights.unet_lora).items()}
    encoder = adapters(weights.encoder_lora)
    if not unet or not encoder:
        raise WeightsError(
            f"the weights {weights.metadata.name!r} have {len(unet)} adapters on the UNet and {len(encoder)} on the "
            f"encoder; the official layout is for weights that have both"
        )
    return unet, encoder


def _full(unet_full: Mapping[str, Tensor], names: Table) -> dict[str, Tensor]:
    """Returns the layers trained in full under the names of the official code."""
    found = {rename(key.removeprefix(UNET_PREFIX), names): tensor for key, tensor in unet_full.items()}
    others = [key for key in found if not FULL_KEY.fullmatch(key)]
    if others:
        raise WeightsError(f"{others[0]} was trained in full; the official layout holds only conv_in in full")
    return {key.replace("conv_in.", "conv_in.base_layer."): tensor for key, tensor in found.items()}


def _lora(module: str, adapter: Adapter, group: str) -> dict[str, Tensor]:
    """Returns an adapter's two tensors under the names of the official code, at its alpha."""
    down, up = adapter.down, adapter.up * (adapter.alpha / OFFICIAL_ALPHA)
    if ENCODER_LINEAR.fullmatch(module):
        down, up = down.flatten(1), up.flatten(1)
    return {f"{module}.lora_A.{group}.weight": down, f"{module}.lora_B.{group}.weight": up}


def _rank(found: Mapping[str, Adapter]) -> int:
    """Returns the rank of all adapters; raises WeightsError if there are several."""
    ranks = sorted({adapter.rank for adapter in found.values()})
    if len(ranks) != 1:
        raise WeightsError(f"the adapters have ranks {ranks}; the official layout holds one rank per network")
    return ranks[0]


def _to_cpu(part: Any) -> Any:
    return {key: tensor.cpu() for key, tensor in part.items()} if isinstance(part, dict) else part


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.official", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("weights", type=Path, help="a TADSR weights file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .pkl file to write")
    options = parser.parse_args(arguments)
    try:
        save_official(options.output, load(options.weights))
    except (WeightsError, OSError) as error:
        print(f"Not written: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
