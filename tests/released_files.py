"""Files in the layouts that authors release, with random adapters for `random_weights.sd_checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from random_weights import sd_unet
from safetensors.torch import save_file
from torch import Tensor, nn

from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.keys import inverse, rename, vae_table_of
from tadsr.releases import MODULE_LISTS
from training.official import GROUPS

RANK = 4
SPREAD = 0.05
RELEASES = {  # method: (name under which it is saved here, timestep, formula)
    "OSEDiff": ("renamed.pth", 999, "noise"),
    "PiSA-SR": ("anything.PKL", 1, "difference"),
    "HYPIR": ("mine.pkl", 200, "noise"),
    "OMGSR-S": ("omgsr/unet/adapter_model.safetensors", 273, "noise"),
}


def modules() -> dict[str, tuple[int, ...]]:
    """Returns the UNet's adaptable modules in diffusers' names, with the shapes of their weights."""
    return {
        name: tuple(module.weight.shape)
        for name, module in sd_unet().named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_time_layer(name)
    }


def encoder_modules() -> dict[str, tuple[int, ...]]:
    """Returns some modules of the VAE's encoder, likewise; at least one in each level."""
    names = TimeAwareEncoder(EncoderConfig(), device="meta").state_dict()
    table = inverse(vae_table_of(names))
    convolutions = [k for k, t in names.items() if t.ndim == 4 and (".conv1." in k or ".q." in k or "conv_in" in k)]
    return {rename(key.removesuffix(".weight"), table): tuple(names[key].shape) for key in convolutions}


def _pair(shape: tuple[int, ...], generator: torch.Generator, rank: int = RANK) -> tuple[Tensor, Tensor]:
    up = (shape[0], rank, 1, 1) if len(shape) == 4 else (shape[0], rank)
    a, b = (SPREAD * torch.randn(s, generator=generator) for s in ((rank, *shape[1:]), up))
    return a, b


def _lora(found: dict[str, tuple[int, ...]], adapter: str, seed: int, rank: int = RANK) -> dict[str, Tensor]:
    """Returns peft's tensors. adapter: its name, {} for the group of the module."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in found.items():
        group = GROUPS.get(name.partition(".")[0], "default_others")
        a, b = _pair(shape, generator, rank)
        for side, tensor in (("A", a), ("B", b)):
            tensors[f"{name}.lora_{side}.{adapter.format(group)}.weight"] = tensor
    return tensors


def _lists(suffix: str = "") -> dict[str, list[str]]:
    names = {group: [m for m in modules() if GROUPS[m.partition(".")[0]] == group] for group in MODULE_LISTS}
    return {f"{MODULE_LISTS[group]}{suffix}": found for group, found in names.items()}


def osediff() -> dict[str, Any]:
    generator, (out, *rest) = torch.Generator().manual_seed(9), modules()["conv_in"]
    full = {"conv_in.base_layer.weight": torch.randn(out, *rest, generator=generator) * SPREAD}
    full["conv_in.base_layer.bias"] = torch.randn(out, generator=generator) * SPREAD
    return {
        "state_dict_unet": full | _lora(modules(), "{}", 1),
        "state_dict_vae": _lora(encoder_modules(), "default_encoder", 2),
        "vae_lora_encoder_modules": list(encoder_modules()),
        **_lists(),
        **{"rank_unet": RANK, "rank_vae": RANK},
    }


def pisa_sr() -> dict[str, Any]:
    return {
        "state_dict_unet": _lora(modules(), "{}_pix", 3) | _lora(modules(), "{}_sem", 4),
        **_lists("_pix"),
        **_lists("_sem"),
        **{"lora_rank_unet_pix": RANK, "lora_rank_unet_sem": RANK},
    }


def hypir() -> dict[str, Tensor]:
    return _lora({name: shape for name, shape in modules().items() if name != "conv_in"}, "default", 5, rank=8)


def write_omgsr(folder: Path) -> None:
    """Writes the two folders of peft."""
    linear = {n: s[:2] if ".to_" in n else s for n, s in encoder_modules().items()}
    encoder = {name.removeprefix("encoder."): shape for name, shape in linear.items()}
    for name, found, rank in (("unet", modules(), 8), ("vae", encoder, 2)):
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        tensors = _lora(found, "x", rank, rank=rank)
        save_file({f"base_model.model.{k.replace('.x.', '.')}": t for k, t in tensors.items()}, part / TENSORS)
        (part / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank, "target_modules": []}))


TENSORS = "adapter_model.safetensors"


def write_releases(folder: Path) -> None:
    """Writes a file of each method into the folder, under the names of RELEASES."""
    for method, content in (("OSEDiff", osediff()), ("PiSA-SR", pisa_sr()), ("HYPIR", hypir())):
        torch.save(content, folder / RELEASES[method][0])
    write_omgsr(folder / "omgsr")
