"""A discriminator on the features that LPIPS computes anyway, for realistic texture at high timesteps.

Small heads judge frozen VGG features instead of pixels (as in Projected GANs, arXiv 2111.01007), so that judging costs
almost nothing and learns within a few hundred steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

FEATURES = {1: 128, 2: 256, 3: 512}  # which of the five compared layers of VGG16 are judged, and their channels
WIDTH = 48
SLOPE = 0.2
SMALLEST_SIDE = 24  # of a picture, for three pixels of the last of them


class Discriminator(nn.Module):
    """Judges each place of each feature: high for photographs, low for results."""

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
        """Returns verdicts (B, 1, h, w) of each judged layer. features: of `judged`."""
        # Features have unit length in each pixel; scaled, each channel has unit size.
        return [head(f * f.shape[1] ** 0.5) for head, f in zip(self.heads, features, strict=True)]

    def verdicts(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns the same verdicts, with gradients for the features but none for the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return functional_call(self, frozen, (features,))


def judged(features: Sequence[Tensor]) -> list[Tensor]:
    """Returns those of VGG16's `training.metrics.lpips.LPIPS.features` that the discriminator looks at."""
    return [features[index] for index in FEATURES]


def realism_loss(verdicts: Sequence[Tensor]) -> Tensor:
    """Returns how little the results look like photographs to the discriminator, per sample (B,)."""
    return torch.stack([-verdict.mean(dim=(1, 2, 3)) for verdict in verdicts]).mean(dim=0)


def hinge_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Returns the discriminator's own loss, per sample (B,) (hinge loss, as in arXiv 1705.02894)."""
    losses = [(F.relu(1 - a) + F.relu(1 + b)).mean(dim=(1, 2, 3)) for a, b in zip(real, fake, strict=True)]
    return torch.stack(losses).mean(dim=0)
