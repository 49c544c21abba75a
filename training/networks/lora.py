"""LoRA adapters of peft on a network: put in, listed, loaded, switched off.

A peft layer holds the adapted layer as `base_layer`, and the adapter as `lora_A.default` and `lora_B.default`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tadsr.architecture import is_time_layer
from tadsr.errors import WeightsError
from tadsr.lora import Adapter, check_fits, check_keys

ADAPTER = "default"  # peft's name of the only adapter
BASE_PART, LORA_PARTS = ".base_layer.", (".lora_A.", ".lora_B.")


def adaptable_modules(network: nn.Module) -> list[str]:
    """Returns the modules that get LoRA: every convolution and linear layer but those of the timestep.

    (Behaviour of the official code.)
    """
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_time_layer(name)
    ]


def add_adapters(
    network: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, generator: torch.Generator
) -> None:
    """Puts LoRA on `modules` in place, A Gaussian of deviation 1 / rank, B zero; freezes everything else.

    Adapters are float32, of whatever dtype the network is.
    """
    assert not adapter_layers(network), "the network has adapters already"
    config: Any = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # peft divides it by the rank; a float will do
        init_lora_weights="gaussian",
        target_modules="|".join(map(re.escape, modules)),  # a list would match ends of names too
    )
    inject_adapter_in_model(config, network, ADAPTER)
    layers = adapter_layers(network)
    check_keys("modules with LoRA", layers, set(modules))
    for layer in layers.values():
        down, up = _parameters(layer)
        down.data = torch.randn(down.shape, generator=generator).to(down.device) / rank
        up.data = up.data.float()


def adapter_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """Returns the peft layer of each adapted module."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def read_adapters(network: nn.Module) -> dict[str, Adapter]:
    """Returns a copy of each module's adapter."""
    found = {}
    for name, layer in adapter_layers(network).items():
        down, up = (parameter.detach().clone() for parameter in _parameters(layer))
        found[name] = Adapter(down, up, float(layer.lora_alpha[ADAPTER]))
    return found


@torch.no_grad()
def load_adapters(network: nn.Module, adapters: Mapping[str, Adapter], what: str) -> None:
    """Copies adapters into the network's. what: names them in the error.

    Raises WeightsError unless modules, shapes, rank and alpha are the network's own.
    """
    layers = adapter_layers(network)
    check_keys(f"LoRA of the {what}", adapters, set(layers))
    for name, adapter in adapters.items():
        layer, (down, up) = layers[name], _parameters(layers[name])
        rank, alpha = layer.r[ADAPTER], float(layer.lora_alpha[ADAPTER])
        if (adapter.rank, adapter.alpha) != (rank, alpha):
            raise WeightsError(
                f"the weights have LoRA of rank {adapter.rank} and alpha {adapter.alpha:g} on the {what}; "
                f"accepted is what this training is configured for, rank {rank} and alpha {alpha:g}"
            )
        check_fits(name, adapter.weight_shape, Adapter(down, up, alpha).weight_shape)
        down.copy_(adapter.down.reshape(down.shape))
        up.copy_(adapter.up.reshape(up.shape))


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Runs the block with the network as it was without adapters. No gradient may be pending across it."""
    layers = adapter_layers(network).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """Returns the network's tensors without its adapters, under the names it had before them."""
    return {
        key.replace(BASE_PART, "."): tensor
        for key, tensor in network.state_dict().items()
        if not any(part in key for part in LORA_PARTS)
    }


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen weights of convolutions and linear layers; norms stay, as autocast needs them so on a CPU."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def _parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A and B of a peft layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
