"""What tells that a weights file is whole: the number of tensors in each section, and a digest of all of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import WeightsError
from .metadata import METADATA_FIELD

COUNTS_FIELD, DIGEST_FIELD = "tadsr.tensors", "tadsr.sha256"  # of the safetensors header


def content_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Returns a SHA-256 of the metadata and of all tensors: names, types, shapes, numbers."""
    digest = hashlib.sha256(f"{header[METADATA_FIELD]}\n{header[COUNTS_FIELD]}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Raises WeightsError if there is a digest and it is another."""
    if header.get(DIGEST_FIELD, "") not in ("", content_digest(tensors, header)):
        raise WeightsError("its numbers are not those that were written (SHA-256 differs): get the file again")


def count_sections(keys: Iterable[str]) -> dict[str, int]:
    return dict(Counter(key.partition(".")[0] for key in keys))


def check_counts(header: Mapping[str, str], keys: Iterable[str]) -> None:
    written, seen = json.loads(header.get(COUNTS_FIELD, "null")), count_sections(keys)
    if written != seen:
        raise WeightsError(f"it holds {seen} tensors, but was written with {written}: get the file again")
