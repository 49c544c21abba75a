"""PiSA-SR's two dials: p = pixel p_pix + semantic (p_full - p_pix), of the network without and with its semantic LoRA.

The MODEL holds one network, with both sets merged. The semantic one, of rank 4, is taken away again from the outputs of
the layers where p_pix is wanted: a second network would take twice the memory, and patches would be computed and undone
for each tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...tadsr.lora import Adapter
from ...tadsr.weights import UNET_PREFIX
from .student import student_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MAX_SHARE = 2.0
WRAPPER_KEY = "tadsr_balance"


def balanced(model: ModelPatcher, pixel: float, semantic: float) -> ModelPatcher:
    """Returns the MODEL with these shares in place of those it had. Raises ValueError for other weights than PiSA-SR's.

    pixel, semantic: 0..2.
    """
    student = student_of(model)
    if not student.semantic:
        raise ValueError(
            f"{student.weights_name} has one set of adapters; accepted is the MODEL of PiSA-SR weights, which have two"
        )
    for name, share in (("pixel", pixel), ("semantic", semantic)):
        if not isinstance(share, int | float) or not math.isfinite(share) or not 0 <= share <= MAX_SHARE:
            raise ValueError(f"{name} is {share}; accepted are numbers from 0 to {MAX_SHARE:g}")
    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    clone.remove_wrappers_with_key(kind, WRAPPER_KEY)
    if (pixel, semantic) != (1, 1):
        clone.add_wrapper_with_key(kind, WRAPPER_KEY, _Balance(student.semantic, pixel, semantic))
    return clone


class _Balance:
    """A wrapper of the UNet's forward."""

    def __init__(self, adapters: Mapping[str, Adapter], pixel: float, semantic: float) -> None:
        self._adapters, self._pixel, self._semantic = adapters, pixel, semantic

    def __call__(self, executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the combined prediction, float32. executor: the network, with its `class_obj`."""
        network: nn.Module = executor.class_obj  # type: ignore[attr-defined] # ComfyUI's WrapperExecutor has it
        full = None if self._semantic == 0 else executor(*args, **kwargs).float()
        with _without(network, self._adapters):
            pixels = executor(*args, **kwargs).float()
        if full is None:
            return self._pixel * pixels
        return self._pixel * pixels + self._semantic * (full - pixels)


@contextmanager
def _without(network: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Takes the adapters' share from each layer's output while the block runs."""
    with ExitStack() as stack:
        for module, adapter in adapters.items():
            layer = network.get_submodule(module.removeprefix(UNET_PREFIX))
            stack.enter_context(_removed(layer.register_forward_hook(_subtraction(adapter))))
        yield


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _subtraction(adapter: Adapter) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """Returns a forward hook that takes the adapter's share from a layer's output."""

    def subtract(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        down, up = (weight.to(device=x.device, dtype=x.dtype) for weight in (adapter.down, adapter.up))
        if isinstance(layer, nn.Conv2d):
            narrow = F.conv2d(x, down.reshape(len(down), *layer.weight.shape[1:]), None, layer.stride, layer.padding)
            share = F.conv2d(narrow, up.reshape(*up.shape[:2], 1, 1))
        else:
            share = F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
        return torch.sub(output, share, alpha=adapter.scale)

    return subtract
