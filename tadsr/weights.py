"""The TADSR weights file: one safetensors file with all that TADSR adds to a Stable Diffusion 2.x model.

Keys on disk are `<section>.<key>`; the sections are the fields of `TadsrWeights`, which gives their keys.
The safetensors metadata holds `tadsr`, the fields of `Metadata` as JSON, and `tadsr.tensors`, the number of
tensors in each section. A file is known by its keys, never by its name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .architecture import time_layer_keys, vae_layout
from .encoder import EncoderConfig, TimeAwareEncoder
from .errors import WeightsError
from .foreign import describe_bytes, describe_keys
from .lora import adapters, check_fits, check_keys, merged

__all__ = [
    "Metadata",
    "TadsrWeights",
    "WeightsError",
    "check_against_base",
    "encoder_state_dict",
    "is_tadsr",
    "load",
    "read_metadata",
    "save",
    "unet_state_dict",
    "validate",
]

FORMAT_VERSION = 1
SECTIONS = ("unet_lora", "unet_full", "encoder_lora", "encoder_time", "base")
PROMPT_KEY = "prompt"
METADATA_FIELD, COUNTS_FIELD = "tadsr", "tadsr.tensors"
MARK = "encoder_time.encoder.time_embedding.linear_1.weight"  # every TADSR file has it, and no other file
UNET_PREFIX, BASE_UNET_PREFIX, BASE_VAE_PREFIX = (
    "diffusion_model.",
    "model.diffusion_model.",
    "first_stage_model.",
)
REQUIRED_BASE_KEYS = {
    f"{BASE_UNET_PREFIX}input_blocks.0.0.weight",
    f"{BASE_VAE_PREFIX}encoder.conv_in.weight",
    f"{BASE_VAE_PREFIX}decoder.conv_in.weight",
}
CONTEXT_WEIGHT = re.compile(r".*\.attn2\.to_k\.weight")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Where weights come from, and how they were trained."""

    name: str
    base_model: str = ""  # the model that the adapters were trained on
    rank: int = 0  # of the UNet's adapters; 0: none
    encoder_rank: int = 0
    alpha: float = 0.0  # the adapters' scale is alpha / rank
    timesteps: tuple[int, ...] = ()  # the student's timesteps in training; empty: all of 1..999
    lam: float = 0.5  # teacher timestep = lam * student timestep + gamma (paper, equation 5)
    gamma: float = 0.0
    prompt: str = ""  # text of the default prompt, if it was a text
    source_sha256: str = ""  # of the file that this one was converted from
    license: str = ""
    vae_norm_groups: int = 32  # groups of every normalisation in the VAE; 32: SD's
    extra: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


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

    @property
    def is_self_contained(self) -> bool:
        """Whether the file carries its base model."""
        return bool(self.base)

    @property
    def base_unet(self) -> dict[str, Tensor]:
        """The base's UNet, keys `diffusion_model.*`."""
        return {f"{UNET_PREFIX}{key}": t for key, t in _without_prefix(self.base, BASE_UNET_PREFIX).items()}

    @property
    def base_vae(self) -> dict[str, Tensor]:
        """The base's VAE, keys `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`."""
        return _without_prefix(self.base, BASE_VAE_PREFIX)


def is_tadsr(keys: Iterable[str]) -> bool:
    """Returns whether these are the keys of a TADSR weights file."""
    return MARK in keys


def save(path: str | os.PathLike[str], weights: TadsrWeights) -> None:
    """Writes a TADSR weights file, whole or not at all. Raises WeightsError if the weights are not valid."""
    validate(weights)
    tensors = {f"{name}.{key}": t for name in SECTIONS for key, t in getattr(weights, name).items()}
    if weights.prompt is not None:
        tensors[PROMPT_KEY] = weights.prompt
    header = {
        "format": "pt",
        METADATA_FIELD: json.dumps(asdict(weights.metadata)),
        COUNTS_FIELD: json.dumps(_count_sections(tensors)),
    }
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what the user's umask gives; save_file makes files private
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, unfinished, header)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> TadsrWeights:
    """Returns the weights in a TADSR file, checked; raises WeightsError naming file, fault and cure."""
    tensors, header = _read(Path(path), with_tensors=True)
    try:
        metadata = _parse_metadata(header)
        unexpected = [key for key in tensors if key != PROMPT_KEY and key.partition(".")[0] not in SECTIONS]
        check_keys("TADSR weights file", tensors, set(tensors) - set(unexpected))
        _check_counts(header, tensors)
        sections = {name: _without_prefix(tensors, f"{name}.") for name in SECTIONS}
        weights = TadsrWeights(**sections, prompt=tensors.get(PROMPT_KEY), metadata=metadata)
        validate(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return weights


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Returns the metadata of a TADSR file without reading its tensors; raises WeightsError."""
    try:
        return _parse_metadata(_read(Path(path), with_tensors=False)[1])
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def validate(weights: TadsrWeights) -> None:
    """Raises WeightsError unless the weights are complete and consistent in themselves."""
    adapters(weights.encoder_lora)
    unet = {**adapters(weights.unet_lora), **weights.unet_full}
    check_keys("UNet section", unet, {key for key in unet if key.startswith(UNET_PREFIX)})
    check_keys("time layers", weights.encoder_time, time_layer_keys(*vae_layout(weights.encoder_time)))
    if weights.prompt is not None and (weights.prompt.ndim != 3 or weights.prompt.shape[0] != 1):
        raise WeightsError(f"prompt has shape {tuple(weights.prompt.shape)}; accepted is (1, tokens, width)")
    for name in ("unet_lora", "unet_full", "encoder_lora", "encoder_time"):
        for key, tensor in getattr(weights, name).items():
            if not tensor.isfinite().all():
                raise WeightsError(f"{name}.{key} holds NaN or infinity: the training run or the file is broken")
    if weights.is_self_contained:
        known = {key for key in weights.base if key.startswith((BASE_UNET_PREFIX, BASE_VAE_PREFIX))}
        check_keys("base model", weights.base, known | REQUIRED_BASE_KEYS)
        check_against_base(weights, {key: t.shape for key, t in weights.base_unet.items()})
        _check_encoder(weights, weights.base_vae)


def check_against_base(weights: TadsrWeights, unet_shapes: Mapping[str, torch.Size]) -> None:
    """Raises WeightsError, naming the first module that differs, unless the UNet part was made for this base.

    unet_shapes: shapes of the base's UNet, keys `diffusion_model.*`.
    """
    for module, adapter in adapters(weights.unet_lora).items():
        check_fits(module, adapter.weight_shape, unet_shapes.get(f"{module}.weight"))
    for key, tensor in weights.unet_full.items():
        check_fits(key, tensor.shape, unet_shapes.get(key))
    context = next((shape[1] for key, shape in unet_shapes.items() if CONTEXT_WEIGHT.fullmatch(key)), None)
    if weights.prompt is not None and weights.prompt.shape[2] != context:
        raise WeightsError(
            f"these TADSR weights were made for another base model: their prompt embedding has width "
            f"{weights.prompt.shape[2]}, the base's UNet takes {context}"
        )


def encoder_state_dict(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a TimeAwareEncoder's state dict, float32, the LoRA merged into it.

    vae: the base VAE, keys `encoder.*` and `quant_conv.*`; others are left out. Raises WeightsError if the
    weights were made for another VAE.
    """
    shapes = _check_encoder(weights, vae)
    state = {**_encoder_part(vae), **weights.encoder_time}
    state = {key: tensor.float().reshape(shapes[key]) for key, tensor in state.items()}
    return merged(state, weights.encoder_lora)


def unet_state_dict(weights: TadsrWeights, unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the student's UNet: the base's, keys `diffusion_model.*`, with all of TADSR's changes."""
    check_against_base(weights, {key: tensor.shape for key, tensor in unet.items()})
    replaced = {key: tensor.to(unet[key].dtype) for key, tensor in weights.unet_full.items()}
    return merged({**unet, **replaced}, weights.unet_lora)


def _check_encoder(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shapes of the encoder that base, time layers and LoRA make, or raises WeightsError."""
    state = {**_encoder_part(vae), **weights.encoder_time}
    try:
        config = EncoderConfig.from_state_dict(state)
    except KeyError as error:
        raise WeightsError(f"the base has no VAE encoder of the Stable Diffusion kind: no {error}") from error
    shapes = {key: t.shape for key, t in TimeAwareEncoder(config, device="meta").state_dict().items()}
    check_keys("VAE encoder of the base, with time layers", state, set(shapes))
    for key, shape in shapes.items():
        seen = state[key].shape
        check_fits(key, seen, shape) if key in weights.encoder_time else check_fits(key, shape, seen)
    for module, adapter in adapters(weights.encoder_lora).items():
        check_fits(module, adapter.weight_shape, shapes.get(f"{module}.weight"))
    return shapes


def _encoder_part(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in vae.items() if key.startswith(("encoder.", "quant_conv."))}


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _count_sections(keys: Iterable[str]) -> dict[str, int]:
    return dict(Counter(key.partition(".")[0] for key in keys))


def _check_counts(header: Mapping[str, str], keys: Iterable[str]) -> None:
    written, seen = json.loads(header.get(COUNTS_FIELD, "null")), _count_sections(keys)
    if written != seen:
        raise WeightsError(f"it holds {seen} tensors, but was written with {written}: get the file again")


def _parse_metadata(header: Mapping[str, str]) -> Metadata:
    try:
        fields: dict[str, Any] = json.loads(header[METADATA_FIELD])
        version = fields["format_version"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(f"its metadata has no readable field {METADATA_FIELD!r}; convert it again") from error
    if version != FORMAT_VERSION:
        raise WeightsError(f"format version is {version!r}; this pack reads {FORMAT_VERSION}: update the pack")
    try:
        return Metadata(**{**fields, "timesteps": tuple(fields.get("timesteps", ()))})
    except TypeError as error:
        raise WeightsError(f"its metadata has unknown or missing fields ({error}): update the pack") from error


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors (or none) and the metadata of a TADSR file; or raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = list(file.keys())
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in keys} if with_tensors and is_tadsr(keys) else {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is {describe_bytes(path)} ({error})") from error
    if not is_tadsr(keys):
        raise WeightsError(f"{path} is not a TADSR weights file but {describe_keys(keys)}")
    return tensors, header
