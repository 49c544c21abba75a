"""LPIPS v0.1 (arXiv 1801.03924), a perceptual distance: the training loss of TADSR (VGG16) and a metric (AlexNet)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.metrics.pretrained import weights_path

MEAN = (-0.030, -0.088, -0.188)
DEVIATION = (0.458, 0.448, 0.450)
"""The ImageNet statistics for images in [-1, 1], rounded as in the released LPIPS."""

NORM_EPS = 1e-10
"""Added to the norm of feature vectors, as in the released LPIPS."""

SQUARED_NORM_FLOOR = 1e-20
"""Keeps the gradient of the norm finite where all features are 0 (the released LPIPS gives NaN there)."""


@dataclass(frozen=True)
class Layer:
    """A convolution of a backbone, followed by ReLU."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    """Side of the max pooling, stride 2, before the convolution; 0 for none."""
    compared: bool = True
    """Whether LPIPS compares what this layer gives."""


LAYERS = {
    "alex": (
        Layer(3, 64, kernel=11, stride=4, padding=2),
        Layer(64, 192, kernel=5, padding=2, pool=3),
        Layer(192, 384, pool=3),
        Layer(384, 256),
        Layer(256, 256),
    ),
    "vgg": (
        Layer(3, 64, compared=False),
        Layer(64, 64),
        Layer(64, 128, pool=2, compared=False),
        Layer(128, 128),
        Layer(128, 256, pool=2, compared=False),
        Layer(256, 256, compared=False),
        Layer(256, 256),
        Layer(256, 512, pool=2, compared=False),
        Layer(512, 512, compared=False),
        Layer(512, 512),
        Layer(512, 512, pool=2, compared=False),
        Layer(512, 512, compared=False),
        Layer(512, 512),
    ),
}
"""AlexNet and VGG16 up to the last convolution."""

SMALLEST_SIDE = {"alex": 31, "vgg": 16}
"""Least height and width at which every layer has an output."""


class LPIPS(nn.Module):
    """Perceptual distance with frozen weights; differentiable with respect to the images."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, net: str = "vgg", weights: Path | None = None) -> None:
        """Loads `net`, vgg or alex, from `weights` or else from the per-user cache (see pretrained).

        Raises ValueError for another name, pretrained.LpipsWeightsError where nothing can be fetched.
        """
        super().__init__()
        path = weights_path(net) if weights is None else weights
        self.net = net
        self.layers = LAYERS[net]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding) for layer in self.layers
        )
        compared = [layer.outputs for layer in self.layers if layer.compared]
        for index, channels in enumerate(compared):
            self.register_buffer(f"head_{index}", torch.empty(channels))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict(load_file(path))
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances (B,) of `a` and `b`: (B, 3, H, W) in [-1, 1]."""
        return self.distance(self.features(a), self.features(b))

    def features(self, image: Tensor) -> list[Tensor]:
        """Returns the five compared features, of unit length in each pixel. image: (B, 3, H, W) in [-1, 1].

        Raises ValueError for images that are too small for the network.
        """
        least = SMALLEST_SIDE[self.net]
        if min(image.shape[2:]) < least:
            raise ValueError(f"LPIPS got {tuple(image.shape)}; accepted with {self.net}: sides from {least}")
        hidden = (image - self.mean) / self.deviation
        compared = []
        for layer, convolution in zip(self.layers, self.convolutions, strict=True):
            if layer.pool:
                hidden = F.max_pool2d(hidden, layer.pool, 2)
            hidden = F.relu(convolution(hidden))
            if layer.compared:
                compared.append(_unit_length(hidden))
        return compared

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Returns the distances (B,) of two results of `features`."""
        total = a[0].new_zeros(a[0].shape[0])
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            per_channel = (x - y).square().mean(dim=(2, 3))
            # Not a matrix product: autocast would compute it in half precision, which loses the small numbers.
            total = total + (per_channel * self.get_buffer(f"head_{index}").to(per_channel.dtype)).sum(dim=1)
        return total


def _unit_length(feature: Tensor) -> Tensor:
    feature = feature.to(torch.promote_types(feature.dtype, torch.float32))  # half precision has no 1e-20
    squared = feature.square().sum(dim=1, keepdim=True).clamp_min(SQUARED_NORM_FLOOR)
    return feature / (squared.sqrt() + NORM_EPS)
