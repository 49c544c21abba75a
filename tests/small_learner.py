"""A small training that saves every step, and comparison of tensors to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.run.checkpoint import Checkpoints, load_optimizer, load_parameters, optimizer_tensors

KEEP = 3


class Learner:
    """A small regression whose random choices follow from the step, and its checkpoints."""

    def __init__(self, size: int = 24, folder: Path | None = None) -> None:
        self.model = nn.Linear(size, size)
        self.unused = nn.Parameter(torch.zeros(3))  # never has a gradient, so AdamW keeps nothing for it
        with torch.no_grad():
            self.model.weight.copy_(torch.linspace(-1, 1, size * size).reshape(size, size))
            self.model.bias.zero_()
        self.names: dict[str, nn.Parameter] = dict(self.model.named_parameters()) | {"unused": self.unused}
        self.optimizer = torch.optim.AdamW(self.names.values(), lr=0.01, weight_decay=0.1)
        self.checkpoints = None if folder is None else Checkpoints(folder, KEEP)

    def step(self, number: int) -> None:
        data = torch.randn(4, self.model.in_features, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        (self.model(data) - data.flip(1)).square().mean().backward()
        self.optimizer.step()

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        moments, state = optimizer_tensors(self.optimizer, self.names, "optimizer.")
        return {f"model.{name}": parameter for name, parameter in self.names.items()} | moments, state

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        load_parameters(self.names, tensors, "model.")
        load_optimizer(self.optimizer, self.names, tensors, state, "optimizer.")

    def train(self, steps: int, tell: Callable[[], object] = lambda: None) -> None:
        """Trains from the last checkpoint, and saves every step."""
        assert self.checkpoints is not None
        done = 0
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self.load(checkpoint.tensors(), checkpoint.state()["optimizer"])
            done = checkpoint.step
        for number in range(done, steps):
            self.step(number)
            tensors, state = self.tensors()
            self.checkpoints.save(number + 1, tensors, {"optimizer": state})
            tell()


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)
