"""The TADSR weights file: one safetensors file with all that TADSR adds to a Stable Diffusion 2.x model.

Keys on disk are `<section>.<key>`; the sections are the fields of `TadsrWeights`, which gives their keys.
The safetensors metadata holds `tadsr`, the fields of `Metadata` as JSON; `tadsr.tensors`, the number of tensors in
each section; and `tadsr.sha256`, a digest of both and of all tensors. A file is known by its keys and metadata, never
by its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .contents import (
    BASE_UNET_PREFIX,
    BASE_VAE_PREFIX,
    PROMPT_KEY,
    SECTIONS,
    UNET_PREFIX,
    TadsrWeights,
    without_prefix,
)
from .digest import COUNTS_FIELD, DIGEST_FIELD, check_counts, content_digest, count_sections
from .digest import check_digest as check_file_digest
from .errors import WeightsError, reading
from .foreign import describe_bytes, describe_keys
from .lora import check_keys, merged
from .metadata import METADATA_FIELD, Metadata, parse_metadata, written
from .validation import check_against_base, check_encoder, encoder_part, is_finite, unet_adapters, validate

__all__ = [
    "BASE_UNET_PREFIX",
    "BASE_VAE_PREFIX",
    "PROMPT_KEY",
    "SECTIONS",
    "UNET_PREFIX",
    "Metadata",
    "TadsrWeights",
    "WeightsError",
    "check_against_base",
    "encoder_state_dict",
    "has_digest",
    "is_finite",
    "is_tadsr",
    "load",
    "read_metadata",
    "save",
    "unet_adapters",
    "unet_state_dict",
    "validate",
    "write_tensors",
]

ALWAYS_CHECKED_BYTES = 64 * 10**6  # larger files are compared with their digest on request only: it takes a while
ACCEPTED = "a TADSR weights file, as python -m tadsr.convert writes it"


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
        METADATA_FIELD: json.dumps(written(weights.metadata)),
        COUNTS_FIELD: json.dumps(count_sections(tensors)),
    }
    header[DIGEST_FIELD] = content_digest(tensors, header)
    write_tensors(Path(path), tensors, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all. Raises OSError, saying what it needs where the disk is full."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what the user's umask gives; save_file makes files private
        save_file(dict(tensors), unfinished, header)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(mode)
        unfinished.replace(path)
    except SafetensorError as error:
        unfinished.unlink(missing_ok=True)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(
            f"{path} could not be written ({error}): it needs {needed:,} bytes in {path.parent}, where "
            f"{shutil.disk_usage(path.parent).free:,} are free"
        ) from error
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
        metadata = parse_metadata(header)
        unexpected = [key for key in tensors if key != PROMPT_KEY and key.partition(".")[0] not in SECTIONS]
        check_keys("TADSR weights file", tensors, set(tensors) - set(unexpected))
        check_counts(header, tensors)
        sections = {name: without_prefix(tensors, f"{name}.") for name in SECTIONS}
        weights = TadsrWeights(**sections, prompt=tensors.get(PROMPT_KEY), metadata=metadata)
        validate(weights)
        if check_digest or path.stat().st_size <= ALWAYS_CHECKED_BYTES:
            check_file_digest(tensors, header)
        return weights


def has_digest(path: str | os.PathLike[str]) -> bool:
    """Returns whether a TADSR file has a digest of its tensors: those written before there was one have none."""
    return DIGEST_FIELD in _read(Path(path), with_tensors=False)[1]


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Returns the metadata of a TADSR file without reading its tensors; raises WeightsError."""
    with reading(path, ACCEPTED):
        return parse_metadata(_read(Path(path), with_tensors=False)[1])


def encoder_state_dict(weights: TadsrWeights, vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a TimeAwareEncoder's state dict, float32, the LoRA merged into it; no tensor is a view of another.

    Time layers that the weights do not have become zeros, with which the encoder is the base's.

    vae: the base VAE, keys `encoder.*` and `quant_conv.*`; others are left out. Raises WeightsError if the
    weights were made for another VAE.
    """
    shapes = check_encoder(weights, vae)
    state = {**encoder_part(vae), **weights.encoder_time}
    state = {key: tensor.to(torch.float32, copy=True).reshape(shapes[key]) for key, tensor in state.items()}
    state |= {key: torch.zeros(shape) for key, shape in shapes.items() if key not in state}
    return merged(state, weights.encoder_lora)


def unet_state_dict(weights: TadsrWeights, unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the student's UNet: the base's, keys `diffusion_model.*`, with all of TADSR's changes."""
    check_against_base(weights, {key: tensor.shape for key, tensor in unet.items()})
    replaced = {key: tensor.to(unet[key].dtype) for key, tensor in weights.unet_full.items()}
    return merged(merged({**unet, **replaced}, weights.unet_lora), weights.unet_lora_semantic)


def _own(key: str, tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy that does not depend on the mapped file; the base's are large, and soon copied."""
    return tensor if key.startswith("base.") else tensor.clone()


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
