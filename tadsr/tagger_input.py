"""What the tagger looks at: the picture as it is enlarged for upscaling, squashed to the network's square."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green, blue
CUBIC = -0.5  # Pillow's cubic, as `geometry.resize_bicubic`
TAPS = 4  # pixels under the cubic


def tagger_input(image: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Returns the network's input, float32 (B, 3, side, side), normalised by ImageNet's mean and spread.

    image: (B, 3, H, W) in [0, 1]; size: (height, width) that it is enlarged to for upscaling, at least its own.
    Equals `geometry.enlarge` to `size`, then a bilinear resize without antialiasing that does not keep the shape, as
    the official test does; but computes only those enlarged pixels that the second resize looks at, so that time and
    memory hardly grow with the picture.
    """
    rows, down = _bilinear_places(size[0], side)
    columns, right = _bilinear_places(size[1], side)
    seen = _enlarged_at(image.float(), 2, rows, size[0])
    seen = _enlarged_at(seen, 3, columns, size[1]).clamp(0.0, 1.0)
    above, below = seen.chunk(2, dim=2)
    near, far = above.lerp(below, down.to(seen)[:, None]).chunk(2, dim=3)
    seen = near.lerp(far, right.to(seen))
    mean, std = (seen.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (seen - mean) / std


def _bilinear_places(length: int, side: int) -> tuple[Tensor, Tensor]:
    """Returns which of `length` pixels a bilinear resize to `side` looks at, first ones then second ones (2 side,), and
    how far towards the second ones (side,)."""
    place = ((torch.arange(side, dtype=torch.float64) + 0.5) * length / side - 0.5).clamp(0, length - 1)
    first = place.floor().long()
    return torch.cat([first, (first + 1).clamp(max=length - 1)]), place - first


def _enlarged_at(image: Tensor, dim: int, places: Tensor, length: int) -> Tensor:
    """Returns the pixels at `places` of the image that is enlarged to `length` along `dim` by Pillow's cubic."""
    size = image.shape[dim]
    centre = (places.double() + 0.5) * size / length
    taps = (centre - TAPS / 2 + 0.5).floor().long()[:, None] + torch.arange(TAPS)
    weights = _cubic((taps + 0.5 - centre[:, None]).abs()) * ((taps >= 0) & (taps < size))
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(image)
    taps = taps.clamp(0, size - 1).to(image.device)
    shape = [-1 if axis == dim else 1 for axis in range(image.ndim)]
    parts = (image.index_select(dim, taps[:, i]) * weights[:, i].reshape(shape) for i in range(TAPS))
    return sum(parts, start=image.new_zeros(()))


def _cubic(x: Tensor) -> Tensor:
    """Returns Keys' cubic at distances `x` >= 0."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
