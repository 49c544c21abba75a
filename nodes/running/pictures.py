"""What happens to one picture before, between and after the networks. All nodes call these.

ComfyUI's IMAGE is (B, H, W, C) in [0, 1]; the method's pictures are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management as mm
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ...tadsr.encoder import mode, sample
from ...tadsr.geometry import Region, enlarge, pad_to_multiple, resize_bicubic, target_size
from ..compat import intermediate_dtype

GREY, RGB, RGBA = 1, 3, 4


@dataclass(frozen=True)
class StageData:
    """A picture on its way from stage to stage."""

    full: Tensor  # (1, C, H, W); after a stage that ran for a region only, just that region
    thumbnail: Tensor | None = None  # (1, C, h, w): a smaller copy that goes through the same stages, for its context
    timestep: int = 0  # that it is encoded for and predicted at

    def then(self, function: Callable[[Tensor], Tensor]) -> StageData:
        """Returns the data with a function applied to the picture and to the thumbnail."""
        return replace(
            self, full=function(self.full), thumbnail=None if self.thumbnail is None else function(self.thumbnail)
        )

    def pasted(self, region: Region | None, height: int, width: int) -> StageData:
        """Returns the data with a region, latent pixels, at its place in an else empty latent of that size."""
        if region is None:
            return self
        full = self.full.new_zeros(*self.full.shape[:2], height, width)
        region.crop(full).copy_(self.full)
        return replace(self, full=full)


def check_image(image: Tensor, name: str = "image") -> Tensor:
    """Returns the batch unchanged; raises ValueError if it is empty, has odd channels, or holds NaN or infinity.

    image: (B, H, W, C), C one of 1 (grey), 3 (RGB), 4 (RGB and alpha).
    """
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(
            f"{name} has the shape {tuple(image.shape)}; accepted is a batch of at least one picture, "
            "(batch, height, width, channels)"
        )
    if image.shape[-1] not in (GREY, RGB, RGBA):
        raise ValueError(f"{name} has {image.shape[-1]} channels; accepted are 1 (grey), 3 (RGB) and 4 (RGB and alpha)")
    for index, picture in enumerate(image):
        finite = picture.isfinite()
        if not finite.all():
            bad = int(picture.numel() - finite.sum())
            raise ValueError(
                f"{name} {index} of the batch holds {bad} values that are NaN or infinite; accepted are "
                "numbers in 0..1. Look at the node that made the picture"
            )
    return image


def to_bchw(picture: Tensor) -> Tensor:
    """Returns one picture of an IMAGE as float32: (H, W, C) -> (1, 3 or 4, H, W) in [0, 1]; grey as RGB."""
    planes = picture.movedim(-1, 0).unsqueeze(0).float().clamp(0.0, 1.0)
    return planes.expand(-1, RGB, -1, -1) if planes.shape[1] == GREY else planes


def to_image(planes: Tensor) -> Tensor:
    """Returns planes as an IMAGE: (B, C, H, W) -> (B, H, W, C), clamped, on ComfyUI's device."""
    where = {"device": mm.intermediate_device(), "dtype": intermediate_dtype()}
    image = planes.movedim(1, -1).to(**where, copy=True, memory_format=torch.contiguous_format)
    return image.clamp_(0.0, 1.0)


def split_alpha(planes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns RGB and alpha, or None without alpha. planes: (B, 3 or 4, H, W)."""
    return planes[:, :RGB], planes[:, RGB:] if planes.shape[1] == RGBA else None


def join_alpha(rgb: Tensor, alpha: Tensor | None) -> Tensor:
    """Returns RGB with its alpha put back, if there is one."""
    return rgb if alpha is None else torch.cat([rgb, alpha.to(rgb)], dim=1)


def result_size(
    image: Tensor,
    scale: float,
    width: int,
    height: int,
    longest_side: int = 0,
    shortest_side: int = 0,
    megapixels: float = 0.0,
) -> tuple[int, int]:
    """Returns (height, width) of the result. image: (B, H, W, C); the rest, from width on, 0 for the scale's."""
    return target_size(
        image.shape[1],
        image.shape[2],
        scale=scale,
        target=(height, width),
        longest_side=longest_side,
        shortest_side=shortest_side,
        megapixels=megapixels,
    )


def enlarge_picture(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the picture enlarged to `size`, its alpha too: (H, W, C) in [0, 1] -> (1, 3 or 4, *size).

    What colours are hidden under full transparency makes no difference to it.
    """
    return enlarge(fill_hidden(to_bchw(picture)), size)


def fill_hidden(planes: Tensor) -> Tensor:
    """Returns a picture whose pixels of alpha 0 have the colour of the nearest that can be seen: (1, 3 or 4, H, W).

    Resizing and networks mix neighbours, and take no notice of alpha.
    """
    rgb, alpha = split_alpha(planes)
    hidden = None if alpha is None else (alpha[0, 0] <= 0).cpu()
    if hidden is None or not hidden.any() or hidden.all():
        return planes
    nearest = distance_transform_edt(hidden.numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(nearest).to(rgb.device, torch.int64)
    return join_alpha(rgb[..., rows, columns], alpha)


def to_encoder_input(
    enlarged: Tensor, timestep: int, downscale: int, thumbnail: tuple[int, int] | None = None
) -> StageData:
    """Returns an enlarged picture ready for the encoder, padded as the networks need. enlarged: (1, 3 or 4, H, W).

    thumbnail: (height, width) in latent pixels of the smaller copy that gives statistics to all stages, if there is
    one.
    """
    padded, _ = pad_to_multiple(enlarged[:, :RGB], downscale)
    if thumbnail is None:
        return StageData(padded, timestep=timestep)
    height, width = thumbnail
    small = resize_bicubic(padded, (height * downscale, width * downscale)).clamp(0.0, 1.0)
    return StageData(padded, small, timestep)


def draw_latent(moments: Tensor, seed: int | None) -> Tensor:
    """Returns the latent, (B, C, h, w), as other nodes have it: the mode, or with a seed a draw from the distribution.

    moments: (B, 2 C, h, w) float32, mean and log-variance.
    """
    if seed is None:
        latent = mode(moments)
    else:
        # Drawn on the CPU, so that a seed gives the same picture on every machine.
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(mode(moments).shape, generator=generator)
        latent = sample(moments, noise.to(moments))
    return latent.to(device=mm.intermediate_device(), dtype=intermediate_dtype())
