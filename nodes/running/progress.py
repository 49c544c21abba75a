"""Progress in time rather than in steps, with the picture as it is assembled; seconds that each stage took here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, perf_counter

import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...tadsr.geometry import Region, TilePlan
from ...tadsr.tiling import Network, OnTiles, blend_weights
from .pictures import RGB
from .plan import Plan, StagePlan

_seconds_per_pixel: dict[tuple[str, ...], float] = {}


def seconds_for(planned: StagePlan) -> float | None:
    """Returns the seconds that the stage will take by the latest run with the same network, or None before one."""
    seconds = _seconds_per_pixel.get(_key(planned))
    return None if seconds is None else seconds * planned.work


def expected_times(plan: Plan) -> list[float]:
    """Returns the times that the stages will take, in seconds or, before all were measured, in any one unit."""
    seconds = [seconds_for(planned) for planned in plan.stages]
    if None not in seconds:
        return [second for second in seconds if second is not None]
    return [planned.stage.typical_time * planned.work for planned in plan.stages]


@contextmanager
def measured(planned: StagePlan, region: Region | None = None) -> Iterator[None]:
    """Measures a stage that the block runs by this plan on one picture, or on a region of it; latent pixels."""
    begin = perf_counter()
    yield
    _seconds_per_pixel[_key(planned)] = (perf_counter() - begin) / planned.work_for(region or planned.tiles.whole)


def _key(planned: StagePlan) -> tuple[str, ...]:
    stage = planned.stage
    return (stage.name, str(stage.patcher.model_size()), str(stage.dtype), str(stage.patcher.load_device))


STEPS = 1000  # of the progress bar: one is less than the page shows
PREVIEW_SIDE = 512  # pixels of the longer side, as core's sampler previews
PREVIEW_INTERVAL = 0.5  # seconds
LEAST_COVERAGE = 1 / 64  # below it a pixel is shown as it was: dividing by less would show noise

PREVIEW_FLAG = "--preview-method"
PROMPT_EXTRA = 3  # where an entry of ComfyUI's queue, (number, id, prompt, extra data, ...), has the user's choices

ComfyPreview = tuple[str, Image.Image, int]  # format, picture, longest side


class Progress:
    """The node's progress bar over stages of unequal length and all pictures of a batch."""

    def __init__(self, plan: Plan, pictures: int) -> None:
        self._bar = comfy.utils.ProgressBar(STEPS)
        self._times = expected_times(plan)
        self._total = sum(self._times) * pictures
        self._done = 0.0

    def of_stage(self, index: int, preview: LivePreview | None = None) -> OnTiles:
        """Returns what stage `index` of the next picture calls after each batch of tiles."""
        before, time = self._done, self._times[index]

        def on_tiles(done: int, total: int, canvas: Tensor) -> None:
            self._done = before + time * done / total
            value = min(STEPS, round(STEPS * self._done / self._total))
            self._bar.update_absolute(value, preview=preview.show(done, canvas) if preview else None)

        return on_tiles


def previews_wanted() -> bool:
    """Returns whether live previews may be shown: not where the user chose none, for the prompt or by ComfyUI's flag.

    Without a choice they are, though core's samplers then show none: theirs cost a decoder, ours nothing.
    """
    method = _method_of_prompt() or "default"
    if method != "default":
        return method != LatentPreviewMethod.NoPreviews.value
    chosen = any(argument.partition("=")[0] == PREVIEW_FLAG for argument in sys.argv)
    return not chosen or latent_preview.default_preview_method != LatentPreviewMethod.NoPreviews


def _method_of_prompt() -> str | None:
    """Returns what the user chose for the prompt that runs, None where he left it to the flag."""
    context, queue = get_executing_context(), getattr(PromptServer.instance, "prompt_queue", None)
    if context is None or queue is None:
        return None
    running, _ = queue.get_current_queue_volatile()
    chosen = [entry[PROMPT_EXTRA].get("preview_method") for entry in running if entry[1] == context.prompt_id]
    return chosen[0] if chosen else None


class LivePreview:
    """A small copy of one picture that turns, tile by tile, from the enlarged input into the result."""

    def __init__(
        self, enlarged: Tensor, plan: TilePlan, factor: int, postprocess: Network, region: Region | None = None
    ) -> None:
        """enlarged: (1, 3 or 4, H, W) in [0, 1]; the rest as of the stage that decodes it."""
        region = region or plan.whole
        shown = region.scaled(factor)
        self._tiles = plan.tiles_for(region)
        self._postprocess = postprocess
        self._step = max(1, -(-max(shown.height, shown.width) // PREVIEW_SIDE))
        rows, columns = slice(shown.top, shown.bottom, self._step), slice(shown.left, shown.right, self._step)
        self._down = _on_axis(plan.height, plan.rows, plan.tile_height, factor, rows)
        self._across = _on_axis(plan.width, plan.columns, plan.tile_width, factor, columns)
        self._before = enlarged[:, :RGB, rows, columns].cpu().contiguous()  # so that it does not keep all of `enlarged`
        self._coverage = torch.zeros(-(-shown.height // self._step), -(-shown.width // self._step))
        self._counted = 0
        self._last = 0.0

    def show(self, done: int, canvas: Tensor) -> ComfyPreview | None:
        """Returns the preview after so many tiles, or None where the last one was shown less than 0.5 s ago."""
        for tile in self._tiles[self._counted : done]:
            self._coverage += torch.outer(self._down[tile.top], self._across[tile.left])
        self._counted = done
        if monotonic() - self._last < PREVIEW_INTERVAL:
            return None
        self._last = monotonic()
        height, width = self._before.shape[-2:]  # without the padding of the canvas
        coverage = self._coverage[:height, :width]
        canvas = canvas[..., :: self._step, :: self._step][..., :height, :width].cpu()
        result = self._postprocess(canvas / coverage.clamp_min(LEAST_COVERAGE))[:, :RGB]
        shown = torch.where(coverage < LEAST_COVERAGE, self._before, self._before.lerp(result, coverage))
        pixels = (shown[0].movedim(0, -1).clamp(0.0, 1.0) * 255).round().byte().numpy()
        return "JPEG", Image.fromarray(pixels), PREVIEW_SIDE


def _on_axis(length: int, starts: Sequence[int], tile: int, factor: int, shown: slice) -> dict[int, Tensor]:
    """Returns the weights of the tile at each start at the pixels shown, 0 where it has none."""
    weights = {}
    for start, inside in blend_weights(length, starts, tile, factor).items():
        axis = torch.zeros(length * factor)
        axis[start * factor : (start + tile) * factor] = inside
        weights[start] = axis[shown]
    return weights
