"""Small whole weights files of every layout, for `benchmarks.fuzz_weights` to damage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadsr import weights as tadsr_weights
from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.lora import Adapter
from tadsr.releases import MODULE_LISTS, PARTS
from tadsr.sources import read_weights
from tadsr.weights import Metadata, TadsrWeights
from training.official import official_state

ENCODER = EncoderConfig(channels=(8, 16), layers_per_level=1, norm_groups=4)
CONTEXT, WIDTH, RANK, ALPHA = 8, 8, 2, 8.0
UNET = {
    "input_blocks.0.0.weight": (WIDTH, 4, 3, 3),
    "input_blocks.0.0.bias": (WIDTH,),
    "input_blocks.1.0.in_layers.2.weight": (WIDTH, WIDTH, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (WIDTH, CONTEXT),
    "output_blocks.0.0.in_layers.2.weight": (WIDTH, WIDTH, 3, 3),
    "output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": (WIDTH, CONTEXT),
    "out.2.weight": (4, WIDTH, 3, 3),
}


@dataclass(frozen=True)
class Good:
    """A whole file: what is damaged, and what it must still be where the damage is not noticed."""

    name: str
    content: bytes
    weights: TadsrWeights


def good_files(folder: Path) -> list[Good]:
    """Returns a whole file of each layout, some 100 KB each; they are also written into the folder."""
    adapters = _adapters()
    official = official_state(adapters)
    osediff = {key: part for key, part in official.items() if key != PARTS["time"]}
    contents: dict[str, Any] = {"tadsr.pkl": official, "osediff.pkl": osediff, "hypir.pth": _hypir(official)}
    contents["pisa.pkl"] = _pisa(official)
    for name, content in contents.items():
        torch.save(content, folder / name)
    for name, weights in (("adapters.safetensors", adapters), ("whole.safetensors", _whole(adapters))):
        tadsr_weights.save(folder / name, weights)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [Good(path.name, path.read_bytes(), read_weights(path)) for path in paths]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum((i + 3) * n for i, n in enumerate(shape))))


def _adapters() -> TadsrWeights:
    """Returns weights of TADSR's layout without a base."""

    def adapt(module: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        up = (shape[0], RANK, 1, 1) if len(shape) == 4 else (shape[0], RANK)
        return Adapter(_random(RANK, *shape[1:]), _random(*up), ALPHA).tensors(module)

    state = TimeAwareEncoder(ENCODER).state_dict()
    modules = {key.removesuffix(".weight"): shape for key, shape in UNET.items() if key.endswith(".weight")}
    unet = {key: t for name, shape in modules.items() for key, t in adapt(f"diffusion_model.{name}", shape).items()}
    layers = {"conv_in": (8, 3, 3, 3), "down.0.block.0.conv1": (8, 8, 3, 3), "down.1.block.0.conv1": (16, 8, 3, 3)}
    encoder = {key: t for name, shape in layers.items() for key, t in adapt(f"encoder.{name}", shape).items()}
    return TadsrWeights(
        unet_lora=unet,
        unet_full={f"diffusion_model.{key}": _random(*UNET[key]) for key in UNET if key.startswith("input_blocks.0")},
        encoder_lora=encoder,
        encoder_time={key: _random(*t.shape) for key, t in state.items() if is_time_layer(key)},
        prompt=None,
        base={},
        metadata=Metadata(
            name="small", rank=RANK, encoder_rank=RANK, alpha=ALPHA, timesteps=(1, 500), vae_norm_groups=4
        ),
    )


def _whole(adapters: TadsrWeights) -> TadsrWeights:
    """Returns weights with a base and a prompt."""
    state = TimeAwareEncoder(ENCODER).state_dict()
    base = {f"model.diffusion_model.{key}": _random(*shape) for key, shape in UNET.items()}
    base |= {f"first_stage_model.{key}": _random(*t.shape) for key, t in state.items() if not is_time_layer(key)}
    base["first_stage_model.decoder.conv_in.weight"] = _random(8, 4, 3, 3)
    metadata = Metadata(name="small, whole", vae_norm_groups=4)
    return TadsrWeights({}, {}, {}, adapters.encoder_time, _random(1, 4, CONTEXT), base, metadata)


def _lora(official: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the UNet's adapters in the official layout."""
    return {key: tensor for key, tensor in official[PARTS["unet"]].items() if ".lora_" in key}


def _hypir(official: dict[str, Any]) -> dict[str, Tensor]:
    lora = _lora(official)
    return {".".join([*key.split(".")[:-2], "default", "weight"]): tensor for key, tensor in lora.items()}


def _pisa(official: dict[str, Any]) -> dict[str, Any]:
    lora, sets = _lora(official), ("pix", "sem")
    return {
        PARTS["unet"]: {f"{key.removesuffix('.weight')}_{name}.weight": lora[key] for name in sets for key in lora},
        **{f"{key}_{name}": official[key] for name in sets for key in MODULE_LISTS.values()},
        **{f"lora_rank_unet_{name}": RANK for name in sets},
    }
