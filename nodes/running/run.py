"""Runs one phase over pictures: whole where they fit, else in tiles that share one picture's context."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from torch import Tensor

from ...tadsr.geometry import Region, resize_bicubic, thumbnail_size
from ...tadsr.shared_context import SharedContext
from ...tadsr.tiling import SMALLEST_TILE, Network, SmallestTileError, TiledRun
from ..compat import is_out_of_memory, run_eagerly
from .memory import PREDICT, not_enough
from .plan import PhasePlan
from .stages import PhaseNetwork

OnTiles = Callable[[int, int, Tensor], None]


class OutOfMemory(RuntimeError):
    """Memory ran out while a network was running."""


@dataclass(frozen=True)
class Passage:
    """A picture on its way from phase to phase."""

    whole: Tensor  # (1, C, H, W); after a phase that ran for a region only, just that region
    sample: Tensor | None = None  # (1, C, h, w): a smaller copy that went through the same phases, for its context

    def then(self, function: Network) -> Passage:
        """Returns the passage with a function of the picture applied to the whole and to the sample."""
        return Passage(function(self.whole), None if self.sample is None else function(self.sample))

    def placed(self, region: Region | None, height: int, width: int) -> Passage:
        """Returns the passage with a region, latent pixels, at its place in an else empty latent of that size."""
        if region is None:
            return self
        whole = self.whole.new_zeros(*self.whole.shape[:2], height, width)
        region.crop(whole).copy_(self.whole)
        return Passage(whole, self.sample)


class PhaseRun:
    """One phase of a batch. What it learns about memory from one picture holds for the next."""

    def __init__(self, plan: PhasePlan) -> None:
        self.plan = plan
        self._batch = plan.batch
        self._largest: int | None = None

    def __call__(
        self, network: PhaseNetwork, picture: Passage, on_tiles: OnTiles, region: Region | None = None
    ) -> Passage:
        """Returns the picture after this phase, float32 on the device of the picture.

        region: the part wanted, latent pixels: the result is this part only. Raises MemoryError where even the
        smallest tile does not fit, UnusableTileError for a tile that no precision makes finite.
        """
        tiles = self.plan.tiles
        one = _OnePicture(self.plan, network, picture)
        run = TiledRun(
            network=one.run,
            source_factor=network.source_factor,
            result_factor=network.result_factor,
            batch=self._batch,
            out_of_memory=(OutOfMemory,),
            smallest=SMALLEST_TILE if network.tileable else max(tiles.height, tiles.width),
            redo=one.redo if network.in_float32 else None,
            on_shrink=lambda run: self._on_shrink(run, one),
            on_tiles=on_tiles,
        )
        run.largest = self._largest
        cut = not tiles.is_whole or self._largest is not None
        try:
            if network.tileable and (picture.sample is not None or (cut and one.shares)):
                one.share_context(self.plan.sample_area if self._largest is None else self._largest**2)
            if not cut:
                one.context = None  # a whole picture is its own context; only the sample goes on
            result = network.finish(run(picture.whole, tiles, region))
        except (SmallestTileError, OutOfMemory):
            raise not_enough(self.plan.cost, min(run.smallest, max(tiles.tile_height, tiles.tile_width))) from None
        self._batch, self._largest = run.batch, run.largest
        if run.redone:
            logging.warning(f"TADSR: {run.redone} tiles came out unusable and were made again in float32")
        return Passage(result, self._sample_after(network, picture, one, result))

    def _sample_after(self, network: PhaseNetwork, picture: Passage, one: _OnePicture, result: Tensor) -> Tensor | None:
        """Returns the sample for the next phase."""
        if one.sample is not None:
            return network.finish(one.sample)
        if network.tileable or picture.sample is None:
            return None
        # A conditioning for places in the picture would mean other places in the sample: it is a copy of the result.
        height, width = (side // network.source_factor * network.result_factor for side in picture.sample.shape[-2:])
        return resize_bicubic(result, (height, width))

    def _on_shrink(self, run: TiledRun, one: _OnePicture) -> None:
        mm.soft_empty_cache()
        cost = self.plan.cost
        if run.largest is None:
            logging.warning(f"TADSR: out of memory; {cost.phase} goes on with fewer tiles at a time ({run.batch})")
            return
        side = run.largest * cost.downscale
        logging.warning(f"TADSR: out of memory; {cost.phase} goes on in tiles of at most {side}x{side} pixels")
        if one.context is None and one.shares:
            one.share_context(run.largest**2)


class _OnePicture:
    """A network at work on one picture, with the picture's context once `share_context` has gathered it."""

    def __init__(self, plan: PhasePlan, network: PhaseNetwork, picture: Passage) -> None:
        self.plan, self.network, self.picture = plan, network, picture
        self.shares = plan.cost.phase != PREDICT or picture.sample is not None
        self.sample: Tensor | None = None
        self.context: SharedContext | None = None

    def run(self, tiles: Tensor) -> Tensor:
        """Returns the network's result. Raises OutOfMemory, or InterruptProcessingException on the user's wish."""
        return self._call(self.network.run, tiles)

    def redo(self, tiles: Tensor) -> Tensor:
        """Returns the network's result in full precision; raises as `run` does."""
        assert self.network.in_float32 is not None
        return self._call(self.network.in_float32, tiles)

    def share_context(self, area: int) -> None:
        """Gathers the context from a copy of up to `area` latent pixels, of fewer where memory is short."""
        while True:
            try:
                self._gather(self._sample(max(area, SMALLEST_TILE**2)))
                return
            except OutOfMemory:
                if area <= SMALLEST_TILE**2:
                    raise
            mm.soft_empty_cache()
            area //= 2

    def _sample(self, area: int) -> Tensor:
        """Returns a copy of the picture, or of the smaller copy that there is, of up to `area` latent pixels."""
        source = self.picture.whole if self.picture.sample is None else self.picture.sample
        factor = self.network.source_factor
        height, width = thumbnail_size(source.shape[-2] // factor, source.shape[-1] // factor, area=area)
        # In float32: torch has no antialiased resizing of half precision on a CPU.
        return resize_bicubic(source.float(), (height * factor, width * factor))

    def _gather(self, sample: Tensor) -> None:
        network = self.network
        for function in (network.run, network.in_float32):
            if function is None:
                continue
            with ExitStack() as stack:
                stack.enter_context(run_eagerly())
                context = stack.enter_context(SharedContext.gather(network.module)) if network.module else None
                result = self._call(function, sample)
            self.context, self.sample = context, result.to(sample.device, torch.float32)
            if self.sample.isfinite().all():
                return

    def _call(self, function: Network, tiles: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        with ExitStack() as stack:
            if self.context is not None:
                stack.enter_context(run_eagerly())
                stack.enter_context(self.context.applied())
            try:
                return function(tiles)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            # Raised after the block above, whose exception holds the tensors of the failed run.
            raise OutOfMemory(message)
