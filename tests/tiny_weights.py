"""Small TADSR weights of every kind, made of seeded random numbers: for tests of the file format."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.lora import Adapter
from tadsr.weights import Metadata, TadsrWeights

ENCODER = EncoderConfig(channels=(32, 64), layers_per_level=1)
CONTEXT_WIDTH = 16
UNET_SHAPES = {
    "diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
    "diffusion_model.input_blocks.0.0.bias": (32,),
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, CONTEXT_WIDTH),
    "diffusion_model.out.2.weight": (4, 32, 3, 3),
}


def base_vae() -> dict[str, Tensor]:
    """Returns a base encoder with a scrap of a decoder, keys without `first_stage_model.`."""
    state = TimeAwareEncoder(ENCODER).state_dict()
    vae = {key: _random(t.shape) for key, t in state.items() if not is_time_layer(key)}
    return vae | {"decoder.conv_in.weight": _random((8, 4, 3, 3))}


def adapters_only() -> TadsrWeights:
    """Returns weights that need a base: what the official checkpoint becomes."""
    time = {key: _random(t.shape) for key, t in TimeAwareEncoder(ENCODER).state_dict().items() if is_time_layer(key)}
    unet, encoder = {}, {}
    for module in ("input_blocks.0.0", "input_blocks.1.1.transformer_blocks.0.attn2.to_k", "out.2"):
        out, *rest = UNET_SHAPES[f"diffusion_model.{module}.weight"]
        unet |= _adapter(out, rest).tensors(f"diffusion_model.{module}")
    for module, out, rest in (
        ("encoder.conv_in", 32, (3, 3, 3)),
        ("encoder.mid.attn_1.q", 64, (64,)),
        ("quant_conv", 8, (8, 1, 1)),
    ):
        encoder |= _adapter(out, rest).tensors(module)
    full = {key: _random(UNET_SHAPES[key]) for key in UNET_SHAPES if ".input_blocks.0.0." in key}
    metadata = Metadata(name="tiny", rank=4, encoder_rank=4, alpha=8.0, timesteps=(1, 500), extra={"seed": "0"})
    return TadsrWeights(unet, full, encoder, time, None, {}, metadata)


def self_contained() -> TadsrWeights:
    """Returns weights that carry base and prompt and have no adapters: what a trained small model becomes."""
    unet = {f"model.{key}": _random(shape) for key, shape in UNET_SHAPES.items()}
    vae = {f"first_stage_model.{key}": t for key, t in base_vae().items()}
    prompt = _random((1, 8, CONTEXT_WIDTH))
    time = adapters_only().encoder_time
    return TadsrWeights({}, {}, {}, time, prompt, unet | vae, Metadata(name="tiny, whole"))


def _adapter(out: int, rest: tuple[int, ...] | list[int]) -> Adapter:
    up = (out, 4, 1, 1) if len(rest) == 3 else (out, 4)
    return Adapter(_random((4, *rest)), _random(up), 8.0)


def _random(shape: tuple[int, ...] | torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator) * 0.1
