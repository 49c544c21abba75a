"""The tagger RAM (Recognize Anything), whose weights DAPE adapts to degraded pictures: picture in, tags out.

A Swin Transformer makes tokens of the picture. A query for each tag looks at them through layers of cross-attention,
and one number tells whether the tag belongs to the picture. Sources: "Recognize Anything" (arXiv 2306.03514), "Swin
Transformer" (arXiv 2103.14030), DAPE in "SeeSR" (arXiv 2311.16518).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import count

SWIN_NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-12  # BERT's
ATTENTION_HEADS = 4  # of the tagging head; no tensor's shape tells it
OTHER_REGION = -100.0  # added to the score of two tokens that are neighbours only because the grid was rolled
MAX_STAGES, MAX_BLOCKS = 8, 64  # more in a file's names than any Swin Transformer has is refused


@dataclass(frozen=True, kw_only=True)
class TaggerConfig:
    """Sizes of a tagger; the defaults are those of RAM with Swin-L."""

    patch: int = 4  # pixels of a token's side
    width: int = 192  # of a token in the first stage; each further stage doubles it
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12  # tokens of a window's side
    embedding_width: int = 512  # of a picture's token and of a tag's label, as the head takes them
    query_width: int = 768
    hidden_width: int = 3072  # between the head's two feed-forward layers
    head_layers: int = 2
    tags: int = 4585

    @property
    def side(self) -> int:
        """Side of the square picture in pixels: that at which the last stage's grid is one window."""
        return self.patch * self.window * 2 ** (len(self.depths) - 1)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> TaggerConfig:
        """Returns the config read from tensor shapes. state: keys as `Tagger`'s.

        Raises KeyError, with the tensor's name, if it is no tagger, and WeightsError for absurd numbers in its names.
        """
        stages = count(state, r"visual_encoder\.layers\.(\d+)\.", MAX_STAGES)
        path = "visual_encoder.layers.{}.blocks"
        tables = [state[f"{path.format(i)}.0.attn.relative_position_bias_table"] for i in range(max(1, stages))]
        patches, labels = state["visual_encoder.patch_embed.proj.weight"], state["label_embed"]
        hidden_width, query_width = state["tagging_head.0.widen.weight"].shape
        return cls(
            patch=patches.shape[-1],
            width=patches.shape[0],
            depths=tuple(count(state, rf"{path.format(i)}\.(\d+)\.", MAX_BLOCKS) for i in range(stages)),
            heads=tuple(table.shape[1] for table in tables),
            window=(isqrt(tables[0].shape[0]) + 1) // 2,  # a side of w has 2 w - 1 relative positions
            embedding_width=labels.shape[1],
            query_width=query_width,
            hidden_width=hidden_width,
            head_layers=count(state, r"tagging_head\.(\d+)\.", MAX_BLOCKS),
            tags=labels.shape[0],
        )


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Returns a LayerNorm of `x`, computed in float32 and given in the dtype of `x`."""
    return norm(x.float()).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Returns attention. q, k, v: (B, tokens, width); bias: (B or 1, heads, q's tokens, k's tokens), added to scores.

    Torch's kernels take the softmax in float32, whatever the dtype.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def window_order(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Returns the tokens of a grid, numbered by rows, in the order of windows moved by `shift`: (windows, window^2)."""
    line = (torch.arange(side, device=device) + shift) % side
    grid = line[:, None] * side + line[None, :]
    return grid.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).reshape(-1, window**2)


def relative_positions(side: int, device: torch.device) -> Tensor:
    """Returns, for each two tokens of a window, the row of the table of biases: (side^2, side^2)."""
    line = torch.arange(side, device=device)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
    down, right = (axis[:, None] - axis[None, :] + side - 1 for axis in (rows, columns))
    return down * (2 * side - 1) + right


def region_bias(order: Tensor, side: int, window: int, shift: int) -> Tensor:
    """Returns what keeps tokens apart that are neighbours only in a moved window: (windows, window^2, window^2)."""
    ends = torch.tensor([side - window, side - shift], device=order.device)
    part = torch.bucketize((torch.arange(side, device=order.device) - shift) % side, ends, right=True)
    regions = (part[:, None] * 3 + part[None, :]).flatten()[order]
    return (regions[:, :, None] != regions[:, None, :]) * OTHER_REGION


@dataclass(frozen=True)
class WindowGrid:
    """How a grid of tokens is cut into windows."""

    order: Tensor  # (windows, window^2): tokens, numbered by rows
    back: Tensor  # (tokens,): where each one is in `order`
    regions: Tensor | None  # (windows, window^2, window^2), added to the scores of moved windows

    @classmethod
    def of(cls, side: int, window: int, shift: int, device: torch.device) -> WindowGrid:
        order = window_order(side, window, shift, device)
        return cls(order, order.flatten().argsort(), region_bias(order, side, window, shift) if shift else None)


class PatchEmbedding(nn.Module):
    """Pixels -> tokens: (B, 3, S, S) -> (B, (S/patch)^2, width)."""

    def __init__(self, config: TaggerConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = operations.Conv2d(3, config.width, config.patch, stride=config.patch, **factory)
        self.norm = operations.LayerNorm(config.width, eps=SWIN_NORM_EPS, **factory)

    def forward(self, image: Tensor) -> Tensor:
        return normalise(self.norm, self.proj(image).flatten(2).transpose(1, 2))


class WindowAttention(nn.Module):
    """Self-attention among the tokens of each window, with a learned bias for their relative position."""

    def __init__(self, width: int, heads: int, window: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads, **factory))
        self.qkv = operations.Linear(width, 3 * width, **factory)
        self.proj = operations.Linear(width, width, **factory)

    def forward(self, windows: Tensor, regions: Tensor | None) -> Tensor:
        table = self.relative_position_bias_table.to(windows.device).float()
        bias = table[relative_positions(self.window, windows.device)].movedim(-1, 0)[None]
        if regions is not None:
            bias = (bias + regions[:, None]).repeat(len(windows) // len(regions), 1, 1, 1)
        q, k, v = self.qkv(windows).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads, bias))


class FeedForward(nn.Module):
    """Linear -> GELU -> Linear, four times wider inside."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, 4 * width, **factory)
        self.fc2 = operations.Linear(4 * width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention in windows, then a feed-forward part."""

    def __init__(self, width: int, heads: int, window: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(width, eps=SWIN_NORM_EPS, **factory)
        self.attn = WindowAttention(width, heads, window, operations, **factory)
        self.norm2 = operations.LayerNorm(width, eps=SWIN_NORM_EPS, **factory)
        self.mlp = FeedForward(width, operations, **factory)

    def forward(self, tokens: Tensor, grid: WindowGrid) -> Tensor:
        windows = normalise(self.norm1, tokens)[:, grid.order].flatten(0, 1)
        attended = self.attn(windows, grid.regions).view_as(tokens)
        tokens = tokens + attended[:, grid.back]
        return tokens + self.mlp(normalise(self.norm2, tokens))


class PatchMerging(nn.Module):
    """Two by two tokens -> one of twice the width."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(4 * width, eps=SWIN_NORM_EPS, **factory)
        self.reduction = operations.Linear(4 * width, 2 * width, bias=False, **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        side = isqrt(tokens.shape[1])
        grid = tokens.unflatten(1, (side, side))
        corners = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(normalise(self.norm, torch.cat(corners, dim=-1).flatten(1, 2)))


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one with moved windows; then merging unless it is the last stage."""

    def __init__(self, config: TaggerConfig, index: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.window, last = config.window, index == len(config.depths) - 1
        self.shift = 0 if last else config.window // 2  # the last stage's grid is one window
        width, heads = config.width * 2**index, config.heads[index]
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, config.window, operations, **factory) for _ in range(config.depths[index])
        )
        self.downsample = None if last else PatchMerging(width, operations, **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        side = isqrt(tokens.shape[1])
        grids = [WindowGrid.of(side, self.window, shift, tokens.device) for shift in (0, self.shift)]
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, grids[index % 2])
        return tokens if self.downsample is None else self.downsample(tokens)


class SwinTransformer(nn.Module):
    """Picture -> tokens, their mean put first: (B, 3, side, side) -> (B, 1 + window^2, last stage's width)."""

    def __init__(self, config: TaggerConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        stages = len(config.depths)
        self.patch_embed = PatchEmbedding(config, operations, **factory)
        self.layers = nn.ModuleList(SwinStage(config, i, operations, **factory) for i in range(stages))
        self.norm = operations.LayerNorm(config.width * 2 ** (stages - 1), eps=SWIN_NORM_EPS, **factory)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patch_embed(image)
        for stage in self.layers:
            tokens = stage(tokens)
        tokens = normalise(self.norm, tokens)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


class HeadLayer(nn.Module):
    """The tags' queries look at the picture's tokens, then a feed-forward part; BERT's layer without self-attention."""

    def __init__(self, config: TaggerConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        width, seen, hidden = config.query_width, config.embedding_width, config.hidden_width
        self.query = operations.Linear(width, width, **factory)
        self.key = operations.Linear(seen, width, **factory)
        self.value = operations.Linear(seen, width, **factory)
        self.attention_out = operations.Linear(width, width, **factory)
        self.attention_norm = operations.LayerNorm(width, eps=HEAD_NORM_EPS, **factory)
        self.widen = operations.Linear(width, hidden, **factory)
        self.narrow = operations.Linear(hidden, width, **factory)
        self.norm = operations.LayerNorm(width, eps=HEAD_NORM_EPS, **factory)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        attended = attend(self.query(queries), self.key(tokens), self.value(tokens), ATTENTION_HEADS)
        queries = normalise(self.attention_norm, queries + self.attention_out(attended))
        return normalise(self.norm, queries + self.narrow(F.gelu(self.widen(queries))))


class Tagger(nn.Module):
    """Tells which tags belong to a picture.

    operations: a namespace with Conv2d, Linear and LayerNorm (`torch.nn`, or one that casts or offloads weights).
    """

    def __init__(
        self,
        config: TaggerConfig,
        *,
        operations: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.visual_encoder = SwinTransformer(config, operations, **factory)
        tokens_width = config.width * 2 ** (len(config.depths) - 1)
        self.image_proj = operations.Linear(tokens_width, config.embedding_width, **factory)
        self.label_embed = nn.Parameter(torch.zeros(config.tags, config.embedding_width, **factory))
        self.wordvec_proj = operations.Linear(config.embedding_width, config.query_width, **factory)
        self.tagging_head = nn.ModuleList(HeadLayer(config, operations, **factory) for _ in range(config.head_layers))
        self.fc = operations.Linear(config.query_width, 1, **factory)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits, float32 (B, tags). image: (B, 3, side, side), as `tagger_input` makes it."""
        tokens = self.image_proj(self.visual_encoder(image))
        labels = self.label_embed.to(image)
        queries = F.relu(self.wordvec_proj(labels)).expand(len(image), -1, -1)
        for layer in self.tagging_head:
            queries = layer(queries, tokens)
        return self.fc(queries).squeeze(-1).float()

    def memory_used(self, batch: int, dtype_size: int) -> int:
        """Returns the bytes of activations that a batch needs at its peak: in the head, where tags outnumber pixels."""
        config = self.config
        return batch * config.tags * (2 * config.hidden_width + 4 * config.query_width) * dtype_size
