"""DISTS (arXiv 2004.07728), a distance of structure and texture that forgives the exact place of a texture's details.

The features are those of LPIPS's VGG16 with blurred instead of maximum pooling, and the picture itself. The weights
alpha and beta come from the wheel of dists-pytorch (MIT), once, into the per-user cache.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.cache import cache_directory, exclusive
from training.metrics.lpips import LPIPS
from training.metrics.pretrained import Package, download

WHEEL = Package(
    "dists-pytorch==0.1",
    "--only-binary=dists-pytorch",
    "73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61",
)
WEIGHTS = "DISTS_pytorch/weights.pt"

C1 = C2 = 1e-6
"""The paper's constants against division by zero, as released."""
ROOT_FLOOR = 1e-12
"""Under the root of the pooling, as released."""
POOLING = (0.25, 0.5, 0.25)
"""A Hann window of 3 pixels; the pooling has stride 2."""


class DISTS(nn.Module):
    """The distance with frozen weights."""

    alpha: Tensor
    beta: Tensor

    def __init__(self) -> None:
        """Loads the weights, fetching them when they are not in the cache yet.

        Raises pretrained.LpipsWeightsError where they cannot be had.
        """
        super().__init__()
        self.vgg = LPIPS("vgg")
        weights = load_file(weights_path())
        total = weights["alpha"].sum() + weights["beta"].sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, weights[name] / total)
        line = torch.tensor(POOLING)
        self.register_buffer("window", torch.outer(line, line), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances (B,), 0 for equal images, of `a` and `b`: (B, 3, H, W) in [-1, 1]."""
        return self.distance(self.features(a), self.features(b))

    def features(self, image: Tensor) -> list[Tensor]:
        """Returns the image in [0, 1] and the five features that are compared. image: (B, 3, H, W) in [-1, 1]."""
        hidden = (image - self.vgg.mean) / self.vgg.deviation
        compared = [image / 2 + 0.5]
        for layer, convolution in zip(self.vgg.layers, self.vgg.convolutions, strict=True):
            if layer.pool:
                hidden = self._pool(hidden)
            hidden = F.relu(convolution(hidden))
            if layer.compared:
                compared.append(hidden)
        return compared

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Returns the distances (B,) of two results of `features`: equations 5 to 7 of the paper."""
        channels = [feature.shape[1] for feature in a]
        similarity = torch.zeros(a[0].shape[0], device=a[0].device)
        for x, y, alpha, beta in zip(a, b, self.alpha.split(channels), self.beta.split(channels), strict=True):
            mean_x, mean_y = _mean(x), _mean(y)
            texture = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
            x, y = x - mean_x, y - mean_y
            structure = (2 * _mean(x * y) + C2) / (_mean(x * x) + _mean(y * y) + C2)
            similarity = similarity + (alpha * texture[..., 0, 0] + beta * structure[..., 0, 0]).sum(dim=1)
        return 1 - similarity

    def _pool(self, hidden: Tensor) -> Tensor:
        """Returns the root of the weighted mean of squares: equation 3 of the paper."""
        channels = hidden.shape[1]
        window = self.get_buffer("window").expand(channels, 1, -1, -1)
        return (F.conv2d(hidden.square(), window, stride=2, padding=1, groups=channels) + ROOT_FLOOR).sqrt()


def weights_path() -> Path:
    """Returns the file of alpha and beta, each (1475,), fetching it when it is not there yet. Errors as DISTS."""
    folder = cache_directory() / "dists"
    path = folder / "dists-0.1.safetensors"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        with exclusive(path):
            if not path.is_file():
                _fetch(path)
    return path


def _fetch(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        content = io.BytesIO(zipfile.ZipFile(download(WHEEL, Path(temporary))).read(WEIGHTS))
        weights = torch.load(content, map_location="cpu", weights_only=True)
        unfinished = Path(temporary) / path.name
        save_file({name: weights[name].flatten().contiguous() for name in ("alpha", "beta")}, unfinished)
        os.replace(unfinished, path)


def _mean(image: Tensor) -> Tensor:
    return image.mean(dim=(2, 3), keepdim=True)
