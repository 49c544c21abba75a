"""The latents of tadsr-mini: patches of 4x4 pixels, as weights of their principal components.

The components are orthonormal, so that the error in pixels is that of the weights times their deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

SIDE = 4  # of a patch, pixels
NUMBERS = 3 * SIDE**2  # in a patch
COMPONENTS = 24  # PSNR-Y 52.7 dB on the Kodak crops; 16: 41.1, 4: 25.7


@dataclass(frozen=True)
class Patches:
    """components: (C, 48), rows orthonormal; deviations: (C,), root mean squares of the weights in photographs."""

    components: Tensor
    deviations: Tensor

    def encode(self, image: Tensor) -> Tensor:
        """Returns the latent, (B, C, H / 4, W / 4), each channel of root mean square about 1.

        image: (B, 3, H, W) in [-1, 1], sides multiples of 4.
        """
        numbers = F.pixel_unshuffle(image, SIDE)
        return F.conv2d(numbers, (self.components / self.deviations[:, None])[:, :, None, None])

    def decode(self, latent: Tensor) -> Tensor:
        """Returns the image, (B, 3, 4 h, 4 w), about [-1, 1]. latent: (B, C, h, w)."""
        matrix = (self.components * self.deviations[:, None]).T.contiguous()
        return F.pixel_shuffle(F.conv2d(latent, matrix[:, :, None, None]), SIDE)

    def save(self, path: Path) -> None:
        save_file({"components": self.components.contiguous(), "deviations": self.deviations}, path)

    @classmethod
    def load(cls, path: Path) -> Patches:
        return cls(**load_file(path))


def fit_patches(crops: np.ndarray, count: int = COMPONENTS) -> Patches:
    """Returns the principal components of crops, uint8 (N, H, W, 3), about mid-grey, the strongest first."""
    moments = torch.zeros(NUMBERS, NUMBERS, dtype=torch.float64)
    seen = 0
    for crop in crops:
        image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].double() / 127.5 - 1
        numbers = F.pixel_unshuffle(image, SIDE)[0].flatten(1)
        moments += numbers @ numbers.T
        seen += numbers.shape[1]
    values, vectors = torch.linalg.eigh(moments / seen)
    order = values.argsort(descending=True)[:count]
    vectors = vectors[:, order]
    vectors = vectors * vectors.sum(0).sign()  # eigenvectors have no sign of their own
    return Patches(vectors.T.float().contiguous(), values[order].sqrt().float())
