"""A network in tiles, as a stage of the nodes runs it, without a ComfyUI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tadsr.geometry import TilePlan
from tadsr.tiling import Network, Tiler


def in_tiles(network: Network, tiler: Tiler, source: Tensor, plan: TilePlan, **options: Any) -> Tensor:
    """Returns what the network makes of the source in tiles. options: of `Tiler.tiling`."""
    tiling = tiler.tiling(source, plan, **options)
    try:
        tiles = next(tiling)
        while True:
            tiles = tiling.send(results_of(network, tiles))
    except StopIteration as end:
        return end.value


def results_of(network: Network, tiles: Tensor) -> tuple[Tensor, ...] | None:
    """Returns the network's result for each tile, or None where memory is too short for them."""
    try:
        return network(tiles).split(1)
    except torch.OutOfMemoryError:
        return None
