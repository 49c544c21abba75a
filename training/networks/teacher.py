"""The teacher and the fake-score model: one frozen UNet in memory, the second is the first with LoRA on it."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.networks.lora import adaptable_modules, adapters_off, add_adapters
from training.randomness import sample_generator

MIDDLE = "mid_block."


class Teacher(nn.Module):
    """Takes over a UNet, freezes it and puts the fake score's LoRA on it.

    adapters: "all", as the paper means, or "middle" for the middle block's only, which is all that the official code
    trains. The adapters are float32; the frozen weights are whatever the caller makes them.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        rank: int = 4,
        alpha: float = 8.0,
        adapters: Literal["all", "middle"] = "all",
        seed: int = 0,
    ) -> None:
        super().__init__()
        modules = [name for name in adaptable_modules(unet) if adapters == "all" or name.startswith(MIDDLE)]
        add_adapters(unet, modules, rank=rank, alpha=alpha, generator=sample_generator(seed, "fake score LoRA", 0))
        self.unet = unet

    def forward(self, z_t: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Returns the fake score's noise (B, 4, h, w). timestep: (B,), 0..999; context: (B, tokens, width)."""
        return self.unet(z_t, timestep, context, return_dict=False)[0]

    @torch.no_grad()
    def teach(self, z_t: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Returns the frozen teacher's noise, without gradients; arguments as of `forward`.

        Must not run between a forward pass and its backward pass: it switches the adapters off for a while.
        """
        with adapters_off(self.unet):
            return self(z_t, timestep, context)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the fake score's parameters by stable names."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def enable_checkpointing(self) -> None:
        """Makes the backward pass compute activations again instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
