"""A network that a run trains, with its own optimiser: the student, the fake score, or the discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tadsr.architecture import is_time_layer
from training.config.train_config import TrainConfig

LEAST_SCALE = 1.0  # of the loss in fp16: gradients that overflow even so are wrong themselves


@dataclass(frozen=True)
class Part:
    """The parameters of one network, and what trains them."""

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing unless training in fp16

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


def make_part(name: str, parameters: dict[str, nn.Parameter], rate: float, config: TrainConfig, device: str) -> Part:
    """Returns a network's part with a new optimiser. rate: the learning rate; device: the type, e.g. cuda."""
    time = [parameter for key, parameter in parameters.items() if is_time_layer(key)]
    groups: list[dict[str, Any]] = [{"params": [p for key, p in parameters.items() if not is_time_layer(key)]}]
    if time:
        groups.append({"params": time, "lr": rate if config.time_learning_rate is None else config.time_learning_rate})
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )
    scaler = torch.amp.GradScaler(device, enabled=config.mixed_precision == "fp16")
    return Part(name, parameters, optimizer, scaler)
