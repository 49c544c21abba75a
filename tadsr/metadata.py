"""The metadata of a weights file: what weights are, where they come from, and how they were trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .color import COLOR_MATCHES, DEFAULT_COLOR_MATCH
from .errors import WeightsError
from .schedule import FORMULAS, check_timestep

METADATA_FIELD = "tadsr"  # of the safetensors header
FORMAT_VERSION = 1


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
    norm_eps: float = 0.0  # epsilon of the normalisations in residual blocks and before the last layer; 0: SD's
    formula: str = "residual"  # how a prediction becomes the clean latent: a name of `schedule.FORMULAS`
    time_aware: bool = True  # False: the encoder is the plain one of the base, and there are no time layers
    empty_prompt: bool = False  # the weights were trained to be given the empty text
    color_match: str = DEFAULT_COLOR_MATCH  # what suits the results: a name of `color.COLOR_MATCHES`
    extra: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


FIELD_TYPES: dict[str, type] = {  # of Metadata; JSON makes anything of anything
    **dict.fromkeys(("name", "base_model", "prompt", "source_sha256", "license", "formula", "color_match"), str),
    **dict.fromkeys(("rank", "encoder_rank", "vae_norm_groups", "format_version"), int),
    **dict.fromkeys(("alpha", "lam", "gamma", "norm_eps"), float),
    **dict.fromkeys(("time_aware", "empty_prompt"), bool),
    **{"timesteps": tuple, "extra": dict},
}
WORDS: dict[type, str] = {
    **{str: "a text", int: "an integer", float: "a number", bool: "true or false"},
    **{tuple: "a list of integers", dict: "names and texts"},
}
LATER = {
    "formula": "residual",
    "time_aware": True,
    "empty_prompt": False,
    "norm_eps": 0.0,
    "color_match": DEFAULT_COLOR_MATCH,
}  # fields added since the first files


def parse_metadata(header: Mapping[str, str]) -> Metadata:
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


def written(metadata: Metadata) -> dict[str, Any]:
    """Returns the metadata as written: fields that came later are left out at their default, for older packs."""
    fields = asdict(metadata)
    return {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}


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
    if metadata.norm_eps < 0:
        raise WeightsError(f"its metadata says norm_eps={metadata.norm_eps}; accepted is a number from 0")
    if metadata.formula not in FORMULAS:
        raise WeightsError(
            f"its metadata says formula={metadata.formula[:80]!r}; known are {', '.join(FORMULAS)}: update the pack"
        )
    if metadata.color_match not in COLOR_MATCHES:
        raise WeightsError(
            f"its metadata says color_match={metadata.color_match[:80]!r}; known are {', '.join(COLOR_MATCHES)}: "
            "update the pack"
        )
    for timestep in metadata.timesteps:
        if type(timestep) is not int:
            raise WeightsError(f"its metadata has the timestep {str(timestep)[:80]!r}; accepted are integers")
        check_timestep(timestep)
