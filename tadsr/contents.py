"""What TADSR, or another one-step method, adds to a Stable Diffusion 2.x model: `TadsrWeights`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .metadata import Metadata

SECTIONS = ("unet_lora", "unet_full", "encoder_lora", "encoder_time", "base", "unet_lora_semantic")
PROMPT_KEY = "prompt"
UNET_PREFIX, BASE_UNET_PREFIX, BASE_VAE_PREFIX = (
    "diffusion_model.",
    "model.diffusion_model.",
    "first_stage_model.",
)


@dataclass(frozen=True)
class TadsrWeights:
    """What TADSR adds to a Stable Diffusion 2.x model, all on the CPU."""

    unet_lora: dict[str, Tensor]  # diffusion_model.<ldm module>.lora_down.weight | .lora_up.weight | .alpha
    unet_full: dict[str, Tensor]  # diffusion_model.<ldm key>: replaces the base's tensor, before the LoRA is added
    encoder_lora: dict[str, Tensor]  # <TimeAwareEncoder module>.lora_down.weight | .lora_up.weight | .alpha
    encoder_time: dict[str, Tensor]  # encoder.time_embedding.*, encoder.<block>.time_emb_proj.*
    prompt: Tensor | None  # (1, tokens, width): embedding of the default prompt
    base: dict[str, Tensor]  # model.diffusion_model.*, first_stage_model.*; empty unless self-contained
    metadata: Metadata
    unet_lora_semantic: dict[str, Tensor] = field(default_factory=dict)  # of PiSA-SR: added to unet_lora, like it

    @property
    def is_self_contained(self) -> bool:
        """Whether the file carries its base model."""
        return bool(self.base)

    @property
    def base_unet(self) -> dict[str, Tensor]:
        """The base's UNet, keys `diffusion_model.*`."""
        return {f"{UNET_PREFIX}{key}": t for key, t in without_prefix(self.base, BASE_UNET_PREFIX).items()}

    @property
    def base_vae(self) -> dict[str, Tensor]:
        """The base's VAE, keys `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`."""
        return without_prefix(self.base, BASE_VAE_PREFIX)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose keys begin with the prefix, under the rest of their keys."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
