"""Turns the official `tadsr.pkl` into a TADSR file: `python -m tadsr.convert tadsr.pkl -o tadsr.safetensors`.

The pickle is read with `weights_only=True`: nothing in it is executed. With --base the base model is taken in
too, which makes a file that needs no checkpoint.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .architecture import UNetLayout
from .errors import WeightsError
from .keys import rename, unet_table, vae_table_of
from .lora import Adapter, adapters, check_keys
from .schedule import timestep_grid
from .sources import read_base, read_pickle, read_prompt, sha256
from .weights import UNET_PREFIX, Metadata, TadsrWeights, save, validate

OFFICIAL_ALPHA = 8.0  # not stored in the official file; behaviour of the released student: scale 2 at rank 4
OFFICIAL_STEPS = 50  # student timesteps: 50 integers, evenly spaced over 1..999
OFFICIAL_TIMESTEPS = timestep_grid(OFFICIAL_STEPS)
OFFICIAL_LICENSE = "Pi-Lab License 1.0 (non-commercial)"
OFFICIAL_BASE = "stable-diffusion-2-1-base"
LICENSE_NOTICE = (
    f"Licence: the official TADSR weights are under the {OFFICIAL_LICENSE}; "
    "the converted file is under the same licence. Do not use it commercially."
)

MODULE_LISTS = {  # adapter name in the official UNet keys: the list of its modules
    "default_encoder": "unet_lora_encoder_modules",
    "default_decoder": "unet_lora_decoder_modules",
    "default_others": "unet_lora_others_modules",
}
VAE_MODULE_LIST, VAE_ADAPTERS = "vae_lora_encoder_modules", ("default_encoder",)
PARTS = {"unet": "state_dict_unet", "vae": "state_dict_vae", "time": "state_dict_vae_time"}
RANKS = {"unet": "rank_unet", "vae": "rank_vae"}
OFFICIAL_KEYS = {*PARTS.values(), *RANKS.values(), *MODULE_LISTS.values(), VAE_MODULE_LIST}
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
# conv_in is trained in full, besides its LoRA
FULL_KEY = re.compile(r"(?P<module>conv_in)\.base_layer\.(?P<part>weight|bias)")


def convert_official(pkl_path: str | Path, base_path: str | Path | None = None) -> TadsrWeights:
    """Returns the weights in an official checkpoint; with a base, self-contained weights.

    base_path: a single-file checkpoint or a diffusers folder. Raises WeightsError for any other file, for a
    missing or left-over tensor, and for a base of other shapes.
    """
    path = Path(pkl_path)
    try:
        weights = weights_from_official(read_pickle(path))
        validate(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    weights = replace(weights, metadata=replace(weights.metadata, source_sha256=sha256(path)))
    if base_path is None:
        return weights
    weights = replace(weights, base=read_base(Path(base_path)))
    try:
        validate(weights)
    except WeightsError as error:
        raise WeightsError(f"{path} with the base {base_path}: {error}") from error
    return weights


def weights_from_official(official: Mapping[str, Any]) -> TadsrWeights:
    """Returns the weights in an official checkpoint's dict; uses every tensor or raises WeightsError."""
    check_keys("official checkpoint", set(official), OFFICIAL_KEYS)
    state = official[PARTS["unet"]]
    full = {key: m for key in state if (m := FULL_KEY.fullmatch(key))}
    lora = _adapters({k: t for k, t in state.items() if k not in full}, official[RANKS["unet"]], MODULE_LISTS)
    for adapter, name in MODULE_LISTS.items():
        _check_modules(name, official[name], lora[adapter])
    table = unet_table(UNetLayout.from_diffusers(module for group in lora.values() for module in group))
    vae_lora = _adapters(official[PARTS["vae"]], official[RANKS["vae"]], VAE_ADAPTERS)["default_encoder"]
    _check_modules(VAE_MODULE_LIST, official[VAE_MODULE_LIST], vae_lora)
    time = official[PARTS["time"]]
    encoder_table = vae_table_of([*time, *vae_lora])
    return TadsrWeights(
        unet_lora=_named(lora.values(), lambda module: UNET_PREFIX + rename(module, table)),
        unet_full={f"{UNET_PREFIX}{rename(m['module'], table)}.{m['part']}": state[key] for key, m in full.items()},
        encoder_lora=_named([vae_lora], lambda module: rename(module, encoder_table)),
        encoder_time={rename(key, encoder_table): tensor for key, tensor in time.items()},
        prompt=None,
        base={},
        metadata=Metadata(
            name="TADSR",
            base_model=OFFICIAL_BASE,
            rank=official[RANKS["unet"]],
            encoder_rank=official[RANKS["vae"]],
            alpha=OFFICIAL_ALPHA,
            timesteps=OFFICIAL_TIMESTEPS,
            license=OFFICIAL_LICENSE,
        ),
    )


def summary(weights: TadsrWeights) -> str:
    """Returns what the weights hold, for people."""
    meta = weights.metadata
    base = "included" if weights.is_self_contained else f"{meta.base_model}, not included"
    prompt = "none; connect one" if weights.prompt is None else f"included, {tuple(weights.prompt.shape)}"
    return "\n".join(
        [
            f"UNet: {len(adapters(weights.unet_lora))} adapters of rank {meta.rank}, "
            f"{len(weights.unet_full)} tensors trained in full",
            f"Encoder: {len(adapters(weights.encoder_lora))} adapters of rank {meta.encoder_rank}, "
            f"{len(weights.encoder_time)} tensors of time layers",
            f"Alpha: {meta.alpha:g}",
            f"Source sha256: {meta.source_sha256}",
            f"Base model: {base}",
            f"Default prompt: {prompt}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tadsr.convert", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the official tadsr.pkl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--base", type=Path, help="checkpoint or diffusers folder to include")
    parser.add_argument("--prompt-embedding", type=Path, help="file with one tensor: the default prompt's embedding")
    options = parser.parse_args(arguments)
    try:
        weights = convert_official(options.checkpoint, options.base)
        if options.prompt_embedding:
            weights = replace(weights, prompt=read_prompt(options.prompt_embedding))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(options.output, weights)
    except (WeightsError, OSError) as error:
        print(f"Not converted: {error}", file=sys.stderr)
        return 1
    print(f"{summary(weights)}\n{LICENSE_NOTICE}\nWrote {options.output}")
    return 0


def _adapters(state: Mapping[str, Tensor], rank: int, names: Iterable[str]) -> dict[str, dict[str, Adapter]]:
    """Returns adapter name -> diffusers module -> adapter; raises WeightsError for any other tensor."""
    matches = [m for key in state if (m := LORA_KEY.fullmatch(key))]
    found: dict[str, dict[str, Adapter]] = {name: {} for name in names}
    expected: set[str] = set()
    for m in matches:
        if m["adapter"] in found:
            a, b = (f"{m['module']}.lora_{side}.{m['adapter']}.weight" for side in "AB")
            expected |= {a, b}
            if a in state and b in state:
                found[m["adapter"]][m["module"]] = Adapter(state[a], state[b], OFFICIAL_ALPHA)
    check_keys("LoRA of the official checkpoint", set(state), expected)
    wrong = [name for group in found.values() for name, adapter in group.items() if adapter.rank != rank]
    if wrong:
        raise WeightsError(f"the checkpoint says rank {rank}, but {wrong[0]} and {len(wrong) - 1} more differ")
    return found


def _check_modules(name: str, listed: Iterable[str], found: Iterable[str]) -> None:
    """Raises WeightsError unless a list of the checkpoint (it repeats names) is that of the adapters."""
    check_keys(f"modules in {name}", set(found), set(listed))


def _named(groups: Iterable[Mapping[str, Adapter]], name: Callable[[str], str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for group in groups:
        for module, adapter in group.items():
            tensors |= adapter.tensors(name(module))
    return tensors


if __name__ == "__main__":
    sys.exit(main())
