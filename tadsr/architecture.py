"""What the names and shapes of tensors say about a network of the Stable Diffusion kind; no tensor is read.

Numbers in names come from files that anybody can write: nothing is built from one before it is compared with
MAX_LEVELS and MAX_LAYERS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

from .errors import WeightsError

MAX_LEVELS = 16  # resolutions of a network; SD has 4, and 16 would halve a side of 32,768 pixels to one
MAX_LAYERS = 64  # residual blocks, or transformers, in one place; SD has 2 or 3
TIME_EMBEDDING, TIME_PROJECTION = "time_embedding", "time_emb_proj"
TIME_LAYER = re.compile(rf"(.+\.)?({TIME_EMBEDDING}|{TIME_PROJECTION})(\..+)?")
PICTURE_CHANNELS = 3
VAE_ATTENTION = "mid.attn_1."  # in both halves of a VAE

Shapes = Mapping[str, Sequence[int]]  # name of a tensor -> its shape


def count(names: Iterable[str], pattern: str, limit: int) -> int:
    """Returns one more than the highest number that `pattern` captures at the start of a name, or 0.

    Raises WeightsError if that is more than `limit`.
    """
    matches = [m for name in names if (m := re.match(pattern, name))]
    for match in matches:
        digits = match[1].lstrip("0")
        if len(digits) > len(str(limit)) or int(digits or 0) >= limit:
            raise WeightsError(
                f"{match.string[:200]!r} is number {digits[:20]} in its row; networks of the Stable Diffusion kind "
                f"with up to {limit} are accepted"
            )
    return max((int(match[1]) + 1 for match in matches), default=0)


def is_time_layer(name: str) -> bool:
    """Returns whether a module or tensor embeds the timestep or projects the embedding into a block.

    name: in diffusers' layout, or of a Time-Aware Encoder.
    """
    return TIME_LAYER.fullmatch(name) is not None


@dataclass(frozen=True)
class UNetLayout:
    """What decides the module names of a UNet of the SD 2.x kind."""

    levels: int
    layers_per_level: int  # of the down path; the up path has one more
    up_attention: tuple[bool, ...]  # per up block, lowest resolution first: does it hold transformers?

    @classmethod
    def from_diffusers(cls, names: Iterable[str]) -> UNetLayout:
        """Returns the layout of a UNet with these keys or modules, e.g. `down_blocks.0.resnets.0.conv1`."""
        names = set(names)
        levels = count(names, r"down_blocks\.(\d+)\.", MAX_LEVELS)
        layers = count(names, r"down_blocks\.0\.resnets\.(\d+)\.", MAX_LAYERS)
        return cls(levels, layers, attention_levels(names, "up_blocks", levels))

    @classmethod
    def from_ldm(cls, names: Iterable[str]) -> UNetLayout:
        """Returns the layout of a UNet with these keys or modules, e.g. `input_blocks.1.0.in_layers.2`."""
        names = set(names)
        most = 1 + MAX_LEVELS * (MAX_LAYERS + 1)
        downsamplers = [int(m[1]) for n in names if (m := re.match(r"input_blocks\.(\d{1,4})\.0\.op\b", n))]
        blocks = count(names, r"input_blocks\.(\d+)\.", most)
        step = min(downsamplers, default=blocks)
        levels = len(set(downsamplers)) + 1
        if levels > MAX_LEVELS or step - 1 > MAX_LAYERS:
            raise WeightsError(
                f"its names tell a UNet of {levels} levels and {step - 1} layers in each; accepted are up to "
                f"{MAX_LEVELS} and {MAX_LAYERS}"
            )
        attention = (
            any(name.startswith(f"output_blocks.{i * step}.1.transformer_blocks.") for name in names)
            for i in range(levels)
        )
        return cls(levels, step - 1, tuple(attention))


def attention_levels(names: Iterable[str], path: str, levels: int) -> tuple[bool, ...]:
    """Returns, for each block of `down_blocks` or `up_blocks`, whether it holds transformers; diffusers' names."""
    names = list(names)
    return tuple(any(name.startswith(f"{path}.{i}.attentions.") for name in names) for i in range(levels))


def vae_layout(names: Iterable[str]) -> tuple[int, int]:
    """Returns the levels of a VAE, and the encoder's residual blocks in each, of either layout.

    names: keys or modules; half a VAE will do. The decoder has one block more.
    """
    names = set(names)
    levels = max(
        count(names, r"encoder\.down(?:_blocks)?\.(\d+)\.", MAX_LEVELS),
        count(names, r"decoder\.up(?:_blocks)?\.(\d+)\.", MAX_LEVELS),
    )
    layers = max(
        count(names, r"encoder\.down(?:_blocks)?\.0\.(?:resnets|block)\.(\d+)\.", MAX_LAYERS),
        count(names, r"decoder\.up(?:_blocks)?\.0\.(?:resnets|block)\.(\d+)\.", MAX_LAYERS) - 1,
    )
    return levels, layers


@dataclass(frozen=True)
class VaeHalf:
    """Sizes of a VAE's encoder or decoder, single-file names."""

    in_channels: int  # of the first convolution
    out_channels: int  # of the last one; an encoder's are mean and log-variance
    channels: tuple[int, ...]  # per level, from full resolution down
    blocks: int  # residual blocks in each level
    mid_attention: bool

    @property
    def patch(self) -> int:
        """Side of the square of pixels that a decoder's last convolution gives for each of its own; SD's: 1."""
        return max(1, isqrt(self.out_channels // PICTURE_CHANNELS))

    @property
    def upscale(self) -> int:
        """Image pixels per latent pixel of a decoder, along each side."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @classmethod
    def of_encoder(cls, shapes: Shapes) -> VaeHalf:
        """Returns the encoder's sizes; raises KeyError, with the tensor's name, if it is none."""
        return cls._read(shapes, "encoder", "down")

    @classmethod
    def of_decoder(cls, shapes: Shapes) -> VaeHalf:
        """Returns the decoder's sizes; raises KeyError, with the tensor's name, if it is none."""
        return cls._read(shapes, "decoder", "up")

    @classmethod
    def _read(cls, shapes: Shapes, half: str, path: str) -> VaeHalf:
        levels = count(shapes, rf"{half}\.{path}\.(\d+)\.", MAX_LEVELS)
        return cls(
            in_channels=shapes[f"{half}.conv_in.weight"][1],
            out_channels=shapes[f"{half}.conv_out.weight"][0],
            channels=tuple(shapes[f"{half}.{path}.{i}.block.0.conv2.weight"][0] for i in range(levels)),
            blocks=count(shapes, rf"{half}\.{path}\.0\.block\.(\d+)\.", MAX_LAYERS),
            mid_attention=any(key.startswith(f"{half}.{VAE_ATTENTION}") for key in shapes),
        )


def shapes_of(state: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors, or of anything else that has a `shape`."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}  # type: ignore[attr-defined]


def time_layer_keys(levels: int, layers: int) -> set[str]:
    """Returns the tensors that a Time-Aware Encoder has beside those of the plain encoder."""
    modules = [f"encoder.{TIME_EMBEDDING}.linear_{i}" for i in (1, 2)]
    modules += [f"encoder.mid.block_{i}.{TIME_PROJECTION}" for i in (1, 2)]
    modules += [f"encoder.down.{i}.block.{j}.{TIME_PROJECTION}" for i in range(levels) for j in range(layers)]
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
