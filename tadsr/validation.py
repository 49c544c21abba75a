"""Checks of weights: complete and consistent in themselves, and made for their base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .architecture import is_time_layer, time_layer_keys, vae_layout
from .contents import BASE_UNET_PREFIX, BASE_VAE_PREFIX, PROMPT_KEY, SECTIONS, UNET_PREFIX, TadsrWeights
from .encoder import EncoderConfig, TimeAwareEncoder
from .errors import WeightsError
from .lora import Adapter, adapters, check_fits, check_keys
from .metadata import check_metadata

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REQUIRED_BASE_KEYS = {
    f"{BASE_UNET_PREFIX}input_blocks.0.0.weight",
    f"{BASE_VAE_PREFIX}encoder.conv_in.weight",
    f"{BASE_VAE_PREFIX}decoder.conv_in.weight",
}
CONTEXT_WEIGHT = re.compile(r".*\.attn2\.to_k\.weight")


def validate(weights: TadsrWeights) -> None:
    """Raises WeightsError unless the weights are complete and consistent in themselves."""
    check_metadata(weights.metadata)
    check_numbers(weights)
    adapters(weights.encoder_lora)
    unet = {**adapters(weights.unet_lora), **adapters(weights.unet_lora_semantic), **weights.unet_full}
    check_keys("UNet section", unet, {key for key in unet if key.startswith(UNET_PREFIX)})
    time = weights.encoder_time
    check_keys("time layers", time, time_layer_keys(*vae_layout(time)) if weights.metadata.time_aware else set())
    if weights.prompt is not None and (weights.prompt.ndim != 3 or weights.prompt.shape[0] != 1):
        raise WeightsError(f"prompt has shape {tuple(weights.prompt.shape)}; accepted is (1, tokens, width)")
    if weights.is_self_contained:
        known = {key for key in weights.base if key.startswith((BASE_UNET_PREFIX, BASE_VAE_PREFIX))}
        check_keys("base model", weights.base, known | REQUIRED_BASE_KEYS)
        check_against_base(weights, {key: t.shape for key, t in weights.base_unet.items()})
        check_encoder(weights, weights.base_vae)


def check_against_base(weights: TadsrWeights, unet_shapes: Mapping[str, torch.Size]) -> None:
    """Raises WeightsError, naming the first module that differs, unless the UNet part was made for this base.

    unet_shapes: shapes of the base's UNet, keys `diffusion_model.*`.
    """
    for module, adapter in unet_adapters(weights):
        check_fits(module, adapter.weight_shape, unet_shapes.get(f"{module}.weight"))
    for key, tensor in weights.unet_full.items():
        check_fits(key, tensor.shape, unet_shapes.get(key))
    context = next((shape[1] for key, shape in unet_shapes.items() if CONTEXT_WEIGHT.fullmatch(key)), None)
    if weights.prompt is not None and weights.prompt.shape[2] != context:
        raise WeightsError(
            f"these TADSR weights were made for another base model: their prompt embedding has width "
            f"{weights.prompt.shape[2]}, the base's UNet takes {context}"
        )


def unet_adapters(weights: TadsrWeights) -> list[tuple[str, Adapter]]:
    """Returns each adapter of the UNet with its module, those of both sets where there are two."""
    return [*adapters(weights.unet_lora).items(), *adapters(weights.unet_lora_semantic).items()]


def check_encoder(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shapes of the encoder that base, time layers and LoRA make, or raises WeightsError."""
    state = {**encoder_part(vae), **weights.encoder_time}
    try:
        config = EncoderConfig.from_state_dict(state, weights.metadata.vae_norm_groups)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"the base has no VAE encoder of the Stable Diffusion kind: no {error}") from error
    _check_norm_groups(config.channels, config.norm_groups)
    shapes = {key: t.shape for key, t in TimeAwareEncoder(config, device="meta").state_dict().items()}
    expected = {k: s for k, s in shapes.items() if weights.metadata.time_aware or not is_time_layer(k)}
    check_keys("VAE encoder of the base, with time layers", state, set(expected))
    for key, shape in expected.items():
        seen = state[key].shape
        check_fits(key, seen, shape) if key in weights.encoder_time else check_fits(key, shape, seen)
    for module, adapter in adapters(weights.encoder_lora).items():
        check_fits(module, adapter.weight_shape, shapes.get(f"{module}.weight"))
    return shapes


def encoder_part(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in vae.items() if key.startswith(("encoder.", "quant_conv."))}


def _check_norm_groups(channels: Iterable[int], groups: int) -> None:
    odd = [width for width in channels if width < 1 or width % groups]
    if odd:
        raise WeightsError(
            f"the VAE has normalisations of {odd[0]} channels, which do not go into {groups} groups; accepted as "
            f"vae_norm_groups are divisors of it, 32 for Stable Diffusion's"
        )


def check_numbers(weights: TadsrWeights) -> None:
    """Raises WeightsError, naming the first tensor, unless all are finite floating-point numbers."""
    prompt = {} if weights.prompt is None else {PROMPT_KEY: weights.prompt}
    for name, section in [*((name, getattr(weights, name)) for name in SECTIONS), ("", prompt)]:
        for key, tensor in section.items():
            full = f"{name}.{key}".lstrip(".")
            if tensor.dtype not in DTYPES:
                accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise WeightsError(f"{full} is of the type {tensor.dtype}; accepted are {accepted}")
            if not is_finite(tensor):
                raise WeightsError(f"{full} holds NaN or infinity: the training run or the file is broken")


def is_finite(tensor: Tensor) -> bool:
    """Returns whether every number is finite; a sum tells it at the speed of memory, without a second tensor."""
    if bool(tensor.sum(dtype=torch.float32).isfinite()):
        return True
    return bool(tensor.isfinite().all())  # the sum of large numbers may have overflowed
