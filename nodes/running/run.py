"""Runs pictures through the stages: whole where they fit, else in tiles that share one picture's context."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

import comfy.model_management as mm
import torch
from torch import Tensor

from ...tadsr.geometry import Region, resize_bicubic, thumbnail_size
from ...tadsr.shared_context import SharedContext
from ...tadsr.tiling import SMALLEST_TILE, OnTiles, SmallestTileError, Tiler, Tiling, check_finite, may_be_wrong
from ..compat import is_out_of_memory, run_eagerly
from .color import ColorMatch, expanded, finish, finish_part
from .memory import out_of_memory_error
from .pictures import StageData, draw_latent, enlarge_picture, to_encoder_input, to_image
from .plan import Plan, StagePlan
from .progress import LivePreview, Progress, measured, previews_wanted
from .stages import Call


class OutOfMemory(RuntimeError):
    """Memory ran out while a network was running."""


class Run:
    """Takes the pictures of one execution from stage to stage, as planned.

    What a stage learns about memory from one picture holds for the next.
    """

    def __init__(self, plan: Plan, progress: Progress, wanted: Region | None = None) -> None:
        """wanted: the part of the result that is wanted, pixels; None: all."""
        self.plan, self.progress, self.wanted = plan, progress, wanted
        self._tilers = [tiler_for(planned) for planned in plan.stages]
        self._names = [planned.stage.name for planned in plan.stages]
        self._regions: tuple[Region | None, ...] = (None,) * len(plan.stages)  # what each must give, latent pixels
        if wanted is not None:
            self._regions = plan.regions_needed(expanded(wanted, plan.size))

    def encode(self, enlarged: Tensor, timestep: int, seed: int | None) -> StageData:
        """Returns the latent of an enlarged picture, (1, 3 or 4, H, W) in [0, 1]. seed: None for the mode."""
        picture = to_encoder_input(enlarged, timestep, self.plan.downscale, self.plan.thumbnail)
        moments = self._through("encode", picture)
        return moments.then(lambda values: draw_latent(values, seed))

    def predict(self, latent: StageData) -> StageData:
        """Returns the clean latent."""
        return self._through("predict", latent)

    def decode(self, latent: StageData, picture: Tensor) -> StageData:
        """Returns the decoded picture, or what the wanted part of it needs, before its colours are matched.

        picture: the input, (H, W, C).
        """
        planned, region = self.plan.stages[-1], self._regions[-1]
        stage = planned.stage
        if planned.tiles.is_whole:
            latent = replace(latent, thumbnail=None)  # it has done its part: nothing asks for its colours
        enlarged = enlarge_picture(picture, self.plan.size)
        preview = None
        if previews_wanted():
            preview = LivePreview(enlarged, planned.tiles, stage.result_factor, stage.postprocess, region)
        return self._through("decode", latent, preview)

    def finish(self, decoded: StageData, picture: Tensor, match: ColorMatch) -> Tensor:
        """Returns the result, or the part of it that is wanted, as an IMAGE. picture: the input, (H, W, C)."""
        # Enlarged again rather than kept: a long batch would hold every reference at once.
        enlarged = enlarge_picture(picture, self.plan.size)
        tiles, factor = self.plan.stages[-1].tiles, self.plan.stages[-1].stage.result_factor
        if not tiles.is_whole:  # coloured as a part of it is, so that a crop preview shows what the whole will be
            at = (self._regions[-1] or tiles.whole).scaled(factor)
            wanted = self.wanted or Region(0, 0, *self.plan.size)
            result = finish_part(decoded, at, wanted, enlarged, self.plan.downscale, match)
        else:
            result = finish(decoded.full, enlarged, match)
            result = result if self.wanted is None else self.wanted.crop(result)
        del enlarged  # of a large picture, the next line would be a third copy
        return to_image(result)

    def _through(self, name: str, data: StageData, preview: LivePreview | None = None) -> StageData:
        """Returns the picture after one stage."""
        index = self._names.index(name)
        planned, region = self.plan.stages[index], self._regions[index]
        with measured(planned, region):
            stage_run = StageRun(planned, self._tilers[index], data)
            result = stage_run(self.progress.of_stage(index, preview), region)
        if index == len(self._names) - 1:
            return result
        return result.pasted(region, planned.tiles.height, planned.tiles.width)


def tiler_for(planned: StagePlan) -> Tiler:
    """Returns what cuts pictures for a stage, and remembers what fitted in memory."""
    stage, tiles = planned.stage, planned.tiles
    return Tiler(
        source_factor=stage.source_factor,
        result_factor=stage.result_factor,
        batch=planned.batch,
        smallest=SMALLEST_TILE if stage.is_tileable else max(tiles.height, tiles.width),
    )


class StageRun:
    """One stage at work on one picture, with the picture's context once `_gather_context` has found it."""

    def __init__(self, planned: StagePlan, tiler: Tiler, data: StageData) -> None:
        self.planned, self.stage, self.tiler, self.data = planned, planned.stage, tiler, data
        self.thumbnail: Tensor | None = None  # the stage's result for it
        self.context: SharedContext | None = None
        self.remade = 0  # tiles, in float32

    def __call__(self, on_tiles: OnTiles, region: Region | None = None) -> StageData:
        """Returns the picture after the stage, float32 on the device of the picture.

        region: the part wanted, latent pixels: the result is this part only. Raises MemoryError where even the
        smallest tile does not fit, UnusableTileError for a tile that no precision makes finite.
        """
        tiler, tiles = self.tiler, self.planned.tiles
        is_cut = not tiles.is_whole or tiler.largest is not None
        try:
            if self.stage.is_tileable and (self.data.thumbnail is not None or is_cut):
                self._gather_context(self.planned.thumbnail_area if tiler.largest is None else tiler.largest**2)
            if not is_cut:
                self.context = None  # a whole picture is its own context; only the thumbnail goes on
            full = self.stage.postprocess(self._blended(tiler.tiling(self.data.full, tiles, region, on_tiles)))
        except (SmallestTileError, OutOfMemory):
            smallest = min(tiler.smallest, max(tiles.tile_height, tiles.tile_width))
            raise out_of_memory_error(self.stage, smallest) from None
        if self.remade:
            logging.warning(f"TADSR: {self.remade} tiles came out unusable and were made again in float32")
        return StageData(full, self._thumbnail_after(full), self.data.timestep)

    def _blended(self, tiling: Tiling) -> Tensor:
        """Returns what the dialogue returns, whose questions the network answers."""
        tiles = next(tiling)
        while True:
            try:
                results = self._usable(self._call(self.stage.call, tiles), tiles)
            except OutOfMemory:
                results = None
            try:
                tiles = tiling.send(results)
            except StopIteration as end:
                return end.value
            if results is None:
                self._after_shrinking()

    def _call(self, call: Call, tiles: Tensor) -> Tensor:
        """Returns the network's result. Raises OutOfMemory, or InterruptProcessingException on the user's wish."""
        mm.throw_exception_if_processing_interrupted()
        with ExitStack() as stack:
            if self.context is not None:
                stack.enter_context(run_eagerly())
                stack.enter_context(self.context.applied())
            try:
                return call(tiles, self.data.timestep)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            # Raised after the block above, whose exception holds the tensors of the failed call.
            raise OutOfMemory(message)

    def _usable(self, results: Tensor, tiles: Tensor) -> list[Tensor]:
        """Returns each tile's result, made again in full precision where it may be wrong."""
        usable, in_float32 = [], self.stage.in_float32
        for result, tile in zip(results.split(1), tiles.split(1), strict=True):
            if in_float32 is not None and may_be_wrong(result, tile):
                self.remade += 1
                usable.append(check_finite(self._call(in_float32, tile), tile, in_float32=True))
            else:
                usable.append(check_finite(result, tile, in_float32=False))
        return usable

    def _after_shrinking(self) -> None:
        mm.soft_empty_cache()
        name, tiler = self.stage.name, self.tiler
        if tiler.largest is None:
            logging.warning(f"TADSR: out of memory; {name} goes on with fewer tiles at a time ({tiler.batch})")
            return
        side = tiler.largest * self.stage.downscale
        logging.warning(f"TADSR: out of memory; {name} goes on in tiles of at most {side}x{side} pixels")
        if self.context is None:
            self._gather_context(tiler.largest**2)

    def _gather_context(self, area: int) -> None:
        """Gathers the context from a copy of up to `area` latent pixels, of fewer where memory is short."""
        while True:
            try:
                self._gather(self._copy(max(area, SMALLEST_TILE**2)))
                return
            except OutOfMemory:
                if area <= SMALLEST_TILE**2:
                    raise
            mm.soft_empty_cache()
            area //= 2

    def _copy(self, area: int) -> Tensor:
        """Returns a copy of the picture, or of the thumbnail that there is, of up to `area` latent pixels."""
        source = self.data.full if self.data.thumbnail is None else self.data.thumbnail
        factor = self.stage.source_factor
        height, width = thumbnail_size(source.shape[-2] // factor, source.shape[-1] // factor, area=area)
        # In float32: torch has no antialiased resizing of half precision on a CPU.
        return resize_bicubic(source.float(), (height * factor, width * factor))

    def _gather(self, copy: Tensor) -> None:
        """Takes context and thumbnail from a copy of the picture."""
        module = self.stage.module
        for call in filter(None, (self.stage.call, self.stage.in_float32)):
            with ExitStack() as stack:
                stack.enter_context(run_eagerly())
                context = stack.enter_context(SharedContext.gather(module)) if module else None
                result = self._call(call, copy)
            self.context, self.thumbnail = context, result.to(copy.device, torch.float32)
            if self.thumbnail.isfinite().all():
                return

    def _thumbnail_after(self, full: Tensor) -> Tensor | None:
        """Returns the thumbnail for the next stage."""
        if self.thumbnail is not None:
            return self.stage.postprocess(self.thumbnail)
        if self.stage.is_tileable or self.data.thumbnail is None:
            return None
        # A conditioning for places in the picture would mean other places in the thumbnail: it is a copy of the result.
        source, result = self.stage.source_factor, self.stage.result_factor
        height, width = (side // source * result for side in self.data.thumbnail.shape[-2:])
        return resize_bicubic(full, (height, width))
