"""A network that a run trains, with its own optimizer: the student, the fake score, or the discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tadsr.architecture import is_time_layer
from training.config.train_config import TrainConfig
from training.run.checkpoint import Checkpoint
from training.run.optimizer_state import load_optimizer, optimizer_tensors

LEAST_SCALE = 1.0  # of the loss in fp16: gradients that overflow even so are wrong themselves

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class TrainedNetwork(Generic[Network]):
    """A network and what trains it."""

    name: str  # of its part of a checkpoint
    module: Network
    wrapped: nn.Module  # the same one, for forward passes of training: under autocast, in several processes
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing unless training in fp16

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by the names that they have in checkpoints."""
        return trained_parameters(self.module)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        self.scaler.scale(loss).backward()

    def update(self, losses_are_finite: bool, clip_norm: float) -> bool:
        """Clips the gradients and steps, unless they are not finite; clears them; returns whether all was sound.

        Gradients that overflow in fp16 while the losses are finite are no fault: the scaler scales less next time.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), clip_norm)
        finite = losses_are_finite and bool(torch.isfinite(norm))
        adapting = self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE
        if finite or (losses_are_finite and self.scaler.is_enabled()):
            self.scaler.step(self.optimizer)  # leaves out a step of infinite gradients by itself
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return finite or (losses_are_finite and adapting)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what a checkpoint holds of it: tensors under names of the whole run, and the rest in JSON's types."""
        tensors = {f"{self.name}.{name}": parameter.detach().cpu() for name, parameter in self.parameters.items()}
        moments, numbers = optimizer_tensors(self.optimizer, self.parameters, self._moments)
        return tensors | moments, {"optimizer": numbers, "scaler": self.scaler.state_dict()}

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over what `saved` gave; raises CheckpointError if it does not fit."""
        checkpoint.copy_into(self.parameters, tensors, f"{self.name}.")
        load_optimizer(self.optimizer, self.parameters, tensors, state["optimizer"], self._moments)
        if state["scaler"]:  # empty unless it was fp16
            self.scaler.load_state_dict(state["scaler"])

    @property
    def _moments(self) -> str:
        return f"{self.name}_optimizer."


def trained_network(
    name: str, module: Network, rate: float, config: TrainConfig, accelerator: Accelerator
) -> TrainedNetwork[Network]:
    """Moves a network to the device, wraps it and makes its optimizer. rate: the learning rate."""
    wrapped = accelerator.prepare_model(module)
    optimizer = make_optimizer(trained_parameters(module), rate, config)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")
    return TrainedNetwork(name, module, wrapped, optimizer, scaler)


def make_optimizer(parameters: dict[str, nn.Parameter], rate: float, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with the time layers in a group of their own."""
    time = [parameter for key, parameter in parameters.items() if is_time_layer(key)]
    groups: list[dict[str, Any]] = [{"params": [p for key, p in parameters.items() if not is_time_layer(key)]}]
    if time:
        groups.append({"params": time, "lr": rate if config.time_learning_rate is None else config.time_learning_rate})
    return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
