"""Low-rank adapters: `W + (alpha / rank) up @ down`, in the key style that ComfyUI reads without conversion.

A module's adapter is three tensors: `<module>.lora_down.weight` (rank, in, ...), `<module>.lora_up.weight`
(out, rank, ...) and `<module>.alpha` (a number). peft calls the first two lora_A and lora_B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WeightsError

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
SHOWN_KEYS = 3  # how many keys an error lists


@dataclass(frozen=True)
class Adapter:
    """The low-rank change of one module's weight."""

    down: Tensor  # (rank, in) of a linear layer, (rank, in, k, k) of a convolution
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight that it changes."""
        return torch.Size((self.up.shape[0], *self.down.shape[1:]))

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Returns its three tensors under the keys of `module`."""
        return {module + DOWN: self.down, module + UP: self.up, module + ALPHA: torch.tensor(self.alpha)}


def adapters(lora: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """Returns each module's adapter; raises WeightsError if a tensor is missing, left over or misshapen."""
    modules = [key.removesuffix(DOWN) for key in lora if key.endswith(DOWN)]
    expected = {module + part for module in modules for part in (DOWN, UP, ALPHA)}
    check_keys("LoRA", lora, expected)
    found = {}
    for module in modules:
        down, up, alpha = lora[module + DOWN], lora[module + UP], lora[module + ALPHA]
        if alpha.numel() != 1:
            raise WeightsError(f"LoRA of {module}: alpha has the shape {tuple(alpha.shape)}; accepted is one number")
        found[module] = adapter = Adapter(down, up, alpha.item())
        if down.ndim not in (2, 4) or up.ndim not in (2, 4) or not adapter.rank or up.shape[1:].numel() != adapter.rank:
            raise WeightsError(
                f"LoRA of {module}: lora_down is {tuple(adapter.down.shape)} and lora_up "
                f"{tuple(adapter.up.shape)}; they must share their rank (first and second number)"
            )
    return found


def check_keys(what: str, seen: Iterable[str], expected: set[str]) -> None:
    """Raises WeightsError, with counts and the first few keys, unless `seen` and `expected` agree."""
    found = set(seen)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind} ({', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise WeightsError(f"{what}: of {len(expected)} tensors, {' and '.join(parts)}")


def same_shape(a: torch.Size, b: torch.Size) -> bool:
    """Returns whether two weights have one shape, a linear layer counting as a 1x1 convolution."""
    dims = max(len(a), len(b))
    return (*a, *[1] * (dims - len(a))) == (*b, *[1] * (dims - len(b)))


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Returns `weight + scale * up @ down`, computed in float32 or better, in the weight's dtype.

    For a convolution both are flattened first: up (out, rank, 1, 1), down (rank, in, k, k).
    """
    dtype = torch.float32 if weight.itemsize == 1 else torch.promote_types(weight.dtype, torch.float32)
    delta = up.flatten(1).to(dtype) @ down.flatten(1).to(dtype)
    return (weight.to(dtype) + scale * delta.reshape(weight.shape)).to(weight.dtype)


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of `state` with every adapter of `lora` merged into `<module>.weight`.

    Raises WeightsError, naming the first module, if the adapters were made for another network.
    """
    result = dict(state)
    for module, adapter in adapters(lora).items():
        key = f"{module}.weight"
        check_fits(module, adapter.weight_shape, state[key].shape if key in state else None)
        result[key] = merge(state[key], adapter.down, adapter.up, adapter.scale)
    return result


def check_fits(module: str, shape: torch.Size, base: torch.Size | None) -> None:
    """Raises WeightsError unless `base`, the shape in the base (None: no such module), equals `shape`."""
    if base is None or not same_shape(shape, base):
        seen = "has no such module" if base is None else f"has {tuple(base)}"
        raise WeightsError(
            f"these TADSR weights were made for another base model: {module} needs a weight of shape "
            f"{tuple(shape)}, the base {seen}; choose the base that the weights were trained on "
            f"(the official weights need Stable Diffusion 2.1-base)"
        )
