"""The TADSR weights file: one safetensors file with all that TADSR adds to a Stable Diffusion 2.x model.

Keys on disk are `<section>.<key>`; the sections are the fields of `TadsrWeights`, which gives their keys.
The safetensors metadata holds `tadsr`, the fields of `Metadata` as JSON; `tadsr.tensors`, the number of tensors in
each section; and `tadsr.sha256`, a digest of both and of all tensors. A file is known by its keys and metadata, never
by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from .architecture import is_time_layer, time_layer_keys, vae_layout
from .encoder import EncoderConfig, TimeAwareEncoder
from .errors import WeightsError, reading
from .foreign import describe_bytes, describe_keys
from .lora import Adapter, adapters, check_fits, check_keys, merged
from .schedule import FORMULAS, check_timestep

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
    "write_tensors",
]

FORMAT_VERSION = 1
SECTIONS = ("unet_lora", "unet_full", "encoder_lora", "encoder_time", "base", "unet_lora_semantic")
OWN_SECTIONS = tuple(name for name in SECTIONS if name != "base")
PROMPT_KEY = "prompt"
METADATA_FIELD, COUNTS_FIELD, DIGEST_FIELD = "tadsr", "tadsr.tensors", "tadsr.sha256"
ALWAYS_CHECKED_BYTES = 64 * 10**6  # larger files are compared with their digest on request only: it takes a while
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACCEPTED = "a TADSR weights file, as python -m tadsr.convert writes it"
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
    formula: str = "residual"  # how a prediction becomes the clean latent: a name of `schedule.FORMULAS`
    time_aware: bool = True  # False: the encoder is the plain one of the base, and there are no time layers
    empty_prompt: bool = False  # the weights were trained to be given the empty text
    extra: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


FIELD_TYPES: dict[str, type] = {  # of Metadata; JSON makes anything of anything
    **dict.fromkeys(("name", "base_model", "prompt", "source_sha256", "license", "formula"), str),
    **dict.fromkeys(("rank", "encoder_rank", "vae_norm_groups", "format_version"), int),
    **dict.fromkeys(("alpha", "lam", "gamma"), float),
    **dict.fromkeys(("time_aware", "empty_prompt"), bool),
    **{"timesteps": tuple, "extra": dict},
}
WORDS: dict[type, str] = {
    **{str: "a text", int: "an integer", float: "a number", bool: "true or false"},
    **{tuple: "a list of integers", dict: "names and texts"},
}
LATER = {"formula": "residual", "time_aware": True, "empty_prompt": False}  # fields added since the first files


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
        return {f"{UNET_PREFIX}{key}": t for key, t in _without_prefix(self.base, BASE_UNET_PREFIX).items()}

    @property
    def base_vae(self) -> dict[str, Tensor]:
        """The base's VAE, keys `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`."""
        return _without_prefix(self.base, BASE_VAE_PREFIX)


def is_tadsr(keys: Iterable[str], header: Mapping[str, str] | None = None) -> bool:
    """Returns whether these are the keys, or the safetensors metadata, of a TADSR weights file."""
    return METADATA_FIELD in (header or {}) or any(key.startswith("encoder_time.encoder.") for key in keys)


def save(path: str | os.PathLike[str], weights: TadsrWeights) -> None:
    """Writes a TADSR weights file, whole or not at all. Raises WeightsError if the weights are not valid."""
    validate(weights)
    tensors = {f"{name}.{key}": t for name in SECTIONS for key, t in getattr(weights, name).items()}
    if weights.prompt is not None:
        tensors[PROMPT_KEY] = weights.prompt
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    header = {
        "format": "pt",
        METADATA_FIELD: json.dumps(_written(weights.metadata)),
        COUNTS_FIELD: json.dumps(_count_sections(tensors)),
    }
    header[DIGEST_FIELD] = _digest(tensors, header)
    write_tensors(Path(path), tensors, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what the user's umask gives; save_file makes files private
        save_file(dict(tensors), unfinished, header)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, check_digest: bool = False) -> TadsrWeights:
    """Returns the weights in a TADSR file, checked; raises WeightsError naming file, fault and cure.

    The base's tensors are views of the file, mapped into memory; all others are copies, so that the file may change.
    check_digest: compares a file of any size with its digest; otherwise one of up to ALWAYS_CHECKED_BYTES.
    """
    path = Path(path)
    with reading(path, ACCEPTED):
        tensors, header = _read(path, with_tensors=True)
        metadata = _parse_metadata(header)
        unexpected = [key for key in tensors if key != PROMPT_KEY and key.partition(".")[0] not in SECTIONS]
        check_keys("TADSR weights file", tensors, set(tensors) - set(unexpected))
        _check_counts(header, tensors)
        sections = {name: _without_prefix(tensors, f"{name}.") for name in SECTIONS}
        weights = TadsrWeights(**sections, prompt=tensors.get(PROMPT_KEY), metadata=metadata)
        validate(weights)
        if check_digest or path.stat().st_size <= ALWAYS_CHECKED_BYTES:
            _check_digest(tensors, header)
        return weights


def has_digest(path: str | os.PathLike[str]) -> bool:
    """Returns whether a TADSR file has a digest of its tensors: those written before there was one have none."""
    return DIGEST_FIELD in _read(Path(path), with_tensors=False)[1]


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Returns the metadata of a TADSR file without reading its tensors; raises WeightsError."""
    with reading(path, ACCEPTED):
        return _parse_metadata(_read(Path(path), with_tensors=False)[1])


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
        _check_encoder(weights, weights.base_vae)


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


def encoder_state_dict(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a TimeAwareEncoder's state dict, float32, the LoRA merged into it; no tensor is a view of another.

    Time layers that the weights do not have become zeros, with which the encoder is the base's.

    vae: the base VAE, keys `encoder.*` and `quant_conv.*`; others are left out. Raises WeightsError if the
    weights were made for another VAE.
    """
    shapes = _check_encoder(weights, vae)
    state = {**_encoder_part(vae), **weights.encoder_time}
    state = {key: tensor.to(torch.float32, copy=True).reshape(shapes[key]) for key, tensor in state.items()}
    state |= {key: torch.zeros(shape) for key, shape in shapes.items() if key not in state}
    return merged(state, weights.encoder_lora)


def unet_state_dict(weights: TadsrWeights, unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the student's UNet: the base's, keys `diffusion_model.*`, with all of TADSR's changes."""
    check_against_base(weights, {key: tensor.shape for key, tensor in unet.items()})
    replaced = {key: tensor.to(unet[key].dtype) for key, tensor in weights.unet_full.items()}
    return merged(merged({**unet, **replaced}, weights.unet_lora), weights.unet_lora_semantic)


def _check_encoder(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shapes of the encoder that base, time layers and LoRA make, or raises WeightsError."""
    state = {**_encoder_part(vae), **weights.encoder_time}
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


def _encoder_part(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in vae.items() if key.startswith(("encoder.", "quant_conv."))}


def _check_norm_groups(channels: Iterable[int], groups: int) -> None:
    odd = [width for width in channels if width < 1 or width % groups]
    if odd:
        raise WeightsError(
            f"the VAE has normalisations of {odd[0]} channels, which do not go into {groups} groups; accepted as "
            f"vae_norm_groups are divisors of it, 32 for Stable Diffusion's"
        )


def check_metadata(metadata: Metadata) -> None:
    """Raises WeightsError unless every field is of its type and range."""
    for name, kind in FIELD_TYPES.items():
        value = getattr(metadata, name)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise WeightsError(f"its metadata says {name}={str(value)[:80]!r}; accepted is {WORDS[kind]}")
        if kind is float and not math.isfinite(value):
            raise WeightsError(f"its metadata says {name}={value}; accepted is a finite number")
    if metadata.vae_norm_groups < 1:
        raise WeightsError(f"its metadata says vae_norm_groups={metadata.vae_norm_groups}; accepted is a number from 1")
    if metadata.formula not in FORMULAS:
        raise WeightsError(
            f"its metadata says formula={metadata.formula[:80]!r}; known are {', '.join(FORMULAS)}: update the pack"
        )
    for timestep in metadata.timesteps:
        if type(timestep) is not int:
            raise WeightsError(f"its metadata has the timestep {str(timestep)[:80]!r}; accepted are integers")
        check_timestep(timestep)


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


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _written(metadata: Metadata) -> dict[str, Any]:
    """Returns the metadata as written: fields that came later are left out at their default, for older packs."""
    fields = asdict(metadata)
    return {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Returns a SHA-256 of the metadata and of all tensors: names, types, shapes, numbers."""
    digest = hashlib.sha256(f"{header[METADATA_FIELD]}\n{header[COUNTS_FIELD]}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Raises WeightsError if there is a digest and it is another."""
    if header.get(DIGEST_FIELD, "") not in ("", _digest(tensors, header)):
        raise WeightsError("its numbers are not those that were written (SHA-256 differs): get the file again")


def _count_sections(keys: Iterable[str]) -> dict[str, int]:
    return dict(Counter(key.partition(".")[0] for key in keys))


def _check_counts(header: Mapping[str, str], keys: Iterable[str]) -> None:
    written, seen = json.loads(header.get(COUNTS_FIELD, "null")), _count_sections(keys)
    if written != seen:
        raise WeightsError(f"it holds {seen} tensors, but was written with {written}: get the file again")


def _own(key: str, tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy that does not depend on the mapped file; the base's are large, and soon copied."""
    return tensor if key.startswith("base.") else tensor.clone()


def _parse_metadata(header: Mapping[str, str]) -> Metadata:
    try:
        fields: dict[str, Any] = json.loads(header[METADATA_FIELD])
        version = fields["format_version"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(f"its metadata has no readable field {METADATA_FIELD!r}; convert it again") from error
    if version != FORMAT_VERSION:
        raise WeightsError(f"format version is {version!r}; this pack reads {FORMAT_VERSION}: update the pack")
    try:
        metadata = Metadata(**{**fields, "timesteps": tuple(fields.get("timesteps", ()))})
    except TypeError as error:
        raise WeightsError(f"its metadata has unknown or missing fields ({error}): update the pack") from error
    check_metadata(metadata)
    return metadata


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors (or none) and the metadata of a TADSR file; or raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = list(file.keys())
            header = file.metadata() or {}
            wanted = keys if with_tensors and is_tadsr(keys, header) else []
            tensors = {key: _own(key, file.get_tensor(key)) for key in wanted}
    except SafetensorError as error:
        raise WeightsError(f"{path} is {describe_bytes(path)} ({error})") from error
    if not is_tadsr(keys, header):
        raise WeightsError(f"{path} is not a TADSR weights file but {describe_keys(keys)}")
    return tensors, header
