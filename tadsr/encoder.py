"""The Time-Aware VAE Encoder (paper, section 3.3): the Stable Diffusion VAE encoder, told the timestep.

An embedding of the timestep scales and shifts the second normalisation of every residual block. Key names are those
of a single-file Stable Diffusion checkpoint without `first_stage_model.`; the time layers add
`encoder.time_embedding.*` and `*.time_emb_proj.*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import VaeHalf, shapes_of

NORM_EPS = 1e-6  # SD VAE config
MIN_TIME_FEATURES = 128  # sinusoidal features: max(128, first channel count)
TIME_EMBEDDING_WIDTH = 256  # width of the timestep embedding
MAX_PERIOD = 10_000  # sinusoidal features, as in SD's UNet
LOGVAR_RANGE = (-30.0, 20.0)  # clamp of the log-variance, SD VAE
ACTIVATIONS_PER_PIXEL = 5  # peak activation buffers of the first level's width; measured: benchmarks/inference.py


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Part = Callable[[Tensor, Tensor], Tensor]  # of the encoder: features and the timestep's embedding to features


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a Time-Aware Encoder; the defaults are those of SD 2.1."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, from full resolution down
    layers_per_level: int = 2
    mid_attention: bool = True
    norm_groups: int = 32  # no tensor's shape tells it

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def time_features(self) -> int:
        return max(MIN_TIME_FEATURES, self.channels[0])

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], norm_groups: int = 32) -> EncoderConfig:
        """Returns the config read from tensor shapes. state: keys `encoder.*`; raises KeyError if it is no encoder."""
        half = VaeHalf.of_encoder(shapes_of(state))
        return cls(
            in_channels=half.in_channels,
            latent_channels=half.out_channels // 2,
            channels=half.channels,
            layers_per_level=half.blocks,
            mid_attention=half.mid_attention,
            norm_groups=norm_groups,
        )


def timestep_features(timestep: Tensor, width: int) -> Tensor:
    """Returns sinusoidal features, cosine first, frequency shift 0. timestep: (B,); result: (B, width) float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Timestep features -> Linear -> SiLU -> Linear."""

    def __init__(self, features: int, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.features = features
        self.linear_1 = operations.Linear(features, width, **factory)
        self.linear_2 = operations.Linear(width, width, **factory)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_features(timestep, self.features).to(dtype))))


class TimeAwareBlock(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the timestep."""

    def __init__(self, width_in: int, width: int, groups: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(groups, width_in, eps=NORM_EPS, **factory)
        self.conv1 = operations.Conv2d(width_in, width, 3, padding=1, **factory)
        self.time_emb_proj = operations.Linear(TIME_EMBEDDING_WIDTH, 2 * width, **factory)
        self.norm2 = operations.GroupNorm(groups, width, eps=NORM_EPS, **factory)
        self.conv2 = operations.Conv2d(width, width, 3, padding=1, **factory)
        self.nin_shortcut = operations.Conv2d(width_in, width, 1, **factory) if width_in != width else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # In place, where the buffer is this block's own: a new one costs as much time as the arithmetic.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        scale, shift = self.time_emb_proj(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h).mul_(1 + scale).add_(shift)
        h = self.conv2(F.silu(h, inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves both sides: pads right and bottom by one, then a convolution of stride 2."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = operations.Conv2d(width, width, 3, stride=2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns single-head attention over all pixels; all (B, C, H, W)."""
    queries, keys, values = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values).squeeze(1).transpose(1, 2).reshape_as(q)


def run_part(part: Part, h: Tensor, embedding: Tensor) -> Tensor:
    """Returns what a part of the encoder makes of features; see `TimeAwareTrunk.run`."""
    return part(h, embedding)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with 1x1 convolutions as projections."""

    def __init__(self, width: int, groups: int, attention: Attend, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.optimized_attention = attention  # ComfyUI's name for it: `shared_context` finds both
        self.norm = operations.GroupNorm(groups, width, eps=NORM_EPS, **factory)
        self.q = operations.Conv2d(width, width, 1, **factory)
        self.k = operations.Conv2d(width, width, 1, **factory)
        self.v = operations.Conv2d(width, width, 1, **factory)
        self.proj_out = operations.Conv2d(width, width, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(self.optimized_attention(self.q(h), self.k(h), self.v(h)))


class Level(nn.Module):
    """Residual blocks at one resolution, then a downsampling unless it is the last level."""

    def __init__(
        self, width_in: int, width: int, config: EncoderConfig, last: bool, operations: Any, **factory: Any
    ) -> None:
        super().__init__()
        widths = [width_in] + [width] * config.layers_per_level
        self.block = nn.ModuleList(
            TimeAwareBlock(a, b, config.norm_groups, operations, **factory)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.downsample = None if last else Downsample(width, operations, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, embedding)
        return x if self.downsample is None else self.downsample(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, config: EncoderConfig, attention: Attend, operations: Any, **factory: Any) -> None:
        super().__init__()
        width, groups = config.channels[-1], config.norm_groups
        self.block_1 = TimeAwareBlock(width, width, groups, operations, **factory)
        has_attention = config.mid_attention
        self.attn_1 = Attention(width, groups, attention, operations, **factory) if has_attention else nn.Identity()
        self.block_2 = TimeAwareBlock(width, width, groups, operations, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, embedding)), embedding)


class TimeAwareTrunk(nn.Module):
    """The encoder proper: everything before `quant_conv`."""

    def __init__(self, config: EncoderConfig, attention: Attend, operations: Any, **factory: Any) -> None:
        super().__init__()
        channels = config.channels
        self.run = run_part  # training puts another one here, which keeps no activations inside a part
        self.time_embedding = TimeEmbedding(config.time_features, TIME_EMBEDDING_WIDTH, operations, **factory)
        self.conv_in = operations.Conv2d(config.in_channels, channels[0], 3, padding=1, **factory)
        self.down = nn.ModuleList(
            Level(a, b, config, i == len(channels) - 1, operations, **factory)
            for i, (a, b) in enumerate(zip((channels[0], *channels[:-1]), channels, strict=True))
        )
        self.mid = Middle(config, attention, operations, **factory)
        self.norm_out = operations.GroupNorm(config.norm_groups, channels[-1], eps=NORM_EPS, **factory)
        self.conv_out = operations.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1, **factory)

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time_embedding(timestep, image.dtype)
        h = self.conv_in(image)
        for level in self.down:
            h = self.run(level, h, embedding)
        h = self.run(self.mid, h, embedding)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))


class TimeAwareEncoder(nn.Module):
    """Encodes an image, knowing the timestep at which the student will run.

    operations: a namespace with Conv2d, Linear and GroupNorm (`torch.nn`, or one that casts or offloads weights).
    attention: as `attend`; ComfyUI has others.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        operations: ModuleType | type = nn,
        attention: Attend = attend,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.encoder = TimeAwareTrunk(config, attention, operations, **factory)
        moments = 2 * config.latent_channels
        self.quant_conv = operations.Conv2d(moments, moments, 1, **factory)

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return self.config.downscale

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        """Returns the moments (B, 2 C, H / downscale, W / downscale): mean, then log-variance, of the latent.

        image: (B, 3, H, W) in [-1, 1], H and W multiples of `downscale`. timestep: (B,) or (1,), 1..999.
        The latent is not yet multiplied by 0.18215.
        """
        moments = self.quant_conv(self.encoder(image, timestep.to(image.device)))
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def memory_used(self, shape: Sequence[int], dtype_size: int) -> int:
        """Returns the bytes of activations that encoding an image batch of `shape` (B, C, H, W) needs at its peak."""
        batch, _, height, width = shape
        return ACTIVATIONS_PER_PIXEL * self.config.channels[0] * batch * height * width * dtype_size


def mode(moments: Tensor) -> Tensor:
    """Returns the mean of the latent's distribution: (B, 2 C, H, W) -> (B, C, H, W)."""
    return moments.chunk(2, dim=1)[0]


def sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Returns mean + std * noise. moments: (B, 2 C, H, W); noise: (B, C, H, W), standard normal."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise
