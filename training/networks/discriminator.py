"""A discriminator on the features that LPIPS computes anyway, for realistic texture at high timesteps.

Small heads look at frozen VGG features instead of pixels (as in Projected GANs, arXiv 2111.01007), which costs almost
nothing and learns within a few hundred steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

FEATURES = {1: 128, 2: 256, 3: 512}  # which of the five compared layers of VGG16, and their channels
WIDTH = 48
SLOPE = 0.2


class Discriminator(nn.Module):
    """Gives a logit for each place of each feature: high for photographs, low for results."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, WIDTH, 1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(WIDTH, WIDTH, 3),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(WIDTH, 1, 1),
            )
            for channels in FEATURES.values()
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns logits (B, 1, h, w) of each layer. features: of `chosen`."""
        # Features have unit length in each pixel; scaled, each channel has unit size.
        return [head(f * f.shape[1] ** 0.5) for head, f in zip(self.heads, features, strict=True)]

    def frozen_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns the same logits, with gradients for the features but none for the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return functional_call(self, frozen, (features,))


def chosen(features: Sequence[Tensor]) -> list[Tensor]:
    """Returns those of VGG16's `training.metrics.lpips.LPIPS.features` that the discriminator looks at."""
    return [features[index] for index in FEATURES]


def generator_loss(logits: Sequence[Tensor]) -> Tensor:
    """Returns how little the results look like photographs to the discriminator, per sample (B,)."""
    return torch.stack([-each.mean(dim=(1, 2, 3)) for each in logits]).mean(dim=0)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Returns the discriminator's own loss, per sample (B,) (hinge loss, as in arXiv 1705.02894)."""
    losses = [(F.relu(1 - a) + F.relu(1 + b)).mean(dim=(1, 2, 3)) for a, b in zip(real, fake, strict=True)]
    return torch.stack(losses).mean(dim=0)
