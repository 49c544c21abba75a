"""What nodes check of their inputs before they run: ComfyUI looks at the values of widgets, but at none from a link."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

NETWORKS = {  # of a socket's type: what we call; wrappers of other packs have it, too
    "MODEL": ("get_model_object", "model_options", "model_size"),
    "VAE": ("decode", "patcher", "first_stage_model", "latent_channels"),
    "TADSR_ENCODER": ("moments", "patcher", "downscale"),
}
LARGEST_BITS = 256  # no input takes more than a seed's 64


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Makes a node's `execute` raise ValueError for a value that is not of its input's kind.

    Ranges and sizes are for the node itself: only it knows what they mean.
    """
    parameters = inspect.signature(execute)

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        bound = parameters.bind(cls, *args, **kwargs)
        for item in cls.define_schema().inputs:
            if item.id not in bound.arguments or item.get_io_type() not in CHECKS:
                continue
            value = bound.arguments[item.id]
            if value is not None or parameters.parameters[item.id].default is not None:
                bound.arguments[item.id] = CHECKS[item.get_io_type()](item, value)
        return execute(*bound.args, **bound.kwargs)

    return run


def _whole(item: Any, value: object) -> int:
    number = _number(item, value, "whole numbers")
    if number % 1:
        raise _refusal(item, _seen(value), "whole numbers")
    return int(number)


def _number(item: Any, value: object, accepted: str = "") -> float:
    limits = (getattr(item, "min", None), getattr(item, "max", None))
    accepted = accepted or ("finite numbers" if None in limits else f"numbers from {limits[0]:g} to {limits[1]:g}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(item, _seen(value), accepted)
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:  # too long for a float, and to be shown
        raise _refusal(item, f"a number of {value.bit_length()} bits", f"{accepted} of up to {LARGEST_BITS} bits")
    if not math.isfinite(value):
        raise _refusal(item, _seen(value), accepted)
    return value


def _switch(item: Any, value: object) -> bool:
    if not isinstance(value, bool | int | float) or value not in (False, True):
        raise _refusal(item, _seen(value), "true and false")
    return bool(value)


def _choice(item: Any, value: object) -> str:
    if not isinstance(value, str) or value not in item.options:
        raise _refusal(item, _seen(value), ", ".join(item.options))
    return str(value)


def _image(item: Any, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _refusal(item, _kind(value), "batches of pictures, (batch, height, width, channels), floating-point")
    return value


def _mask(item: Any, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.bool):
        raise _refusal(item, _kind(value), "masks, (batch, height, width), floating-point or true and false")
    if value.ndim not in (2, 3):
        raise _refusal(item, f"of the shape {tuple(value.shape)}", "masks, (batch, height, width) or (height, width)")
    return value


def _text(item: Any, value: object) -> str:
    if not isinstance(value, str):
        raise _refusal(item, _kind(value), "text")
    return value


def _latent(item: Any, value: object) -> dict[str, Any]:
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise _refusal(item, _kind(samples), "a LATENT with floating-point samples")
    if samples.ndim != 4 or 0 in samples.shape:
        raise _refusal(item, f"of the shape {tuple(samples.shape)}", "pictures', (batch, channels, height, width)")
    if not samples.isfinite().all():
        raise _refusal(item, "one with NaN or infinity", "finite numbers. Look at the node that made the latent")
    assert isinstance(value, dict)
    return value


def _conditioning(item: Any, value: object) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        seen = "empty" if isinstance(value, list | tuple) else _kind(value)
        raise _refusal(item, seen, "a CONDITIONING of at least one prompt, as of CLIP Text Encode")
    for entry in value:
        embedding = entry[0] if isinstance(entry, list | tuple) and len(entry) == 2 else None
        if not isinstance(embedding, Tensor) or embedding.ndim != 3 or not embedding.is_floating_point():
            raise _refusal(item, f"one with {_kind(embedding)}", "embeddings (batch, tokens, width), floating-point")
        if 0 in embedding.shape or not embedding.isfinite().all():
            raise _refusal(item, "one that is empty, or has NaN or infinity", "finite numbers")
        if not isinstance(entry[1], dict):
            raise _refusal(item, f"one with {_kind(entry[1])} beside its embedding", "a dict there")
    return list(value)


def _seen(value: object) -> str:
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else _kind(value)


def _network(item: Any, value: object) -> object:
    if not all(hasattr(value, name) for name in NETWORKS[item.get_io_type()]):
        what = "empty" if value is None else _kind(value)
        raise _refusal(item, what, f"a {item.get_io_type()}, as Load TADSR Model gives it")
    return value


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, {tuple(value.shape)}"
    return f"of the type {type(value).__name__}"


def _refusal(item: Any, seen: str, accepted: str) -> ValueError:
    return ValueError(f"{item.id} is {seen[:80]}; accepted are {accepted}")


CHECKS: dict[str, Callable[[Any, object], Any]] = {
    "INT": _whole,
    "FLOAT": _number,
    "BOOLEAN": _switch,
    "COMBO": _choice,
    "STRING": _text,
    "IMAGE": _image,
    "MASK": _mask,
    "LATENT": _latent,
    "CONDITIONING": _conditioning,
    **dict.fromkeys(NETWORKS, _network),
}
