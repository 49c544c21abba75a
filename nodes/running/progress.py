"""Progress in time rather than in steps, with the picture as it is assembled; seconds that each phase took here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, perf_counter

import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...tadsr.geometry import Region, TilePlan
from ...tadsr.tiling import Network, blend_weights
from .memory import PREDICT
from .pictures import RGB
from .plan import PhasePlan
from .run import OnTiles

# Time of the phases for one latent pixel before anything was measured, relative to each other.
TYPICAL_SHARES = {"encode": 0.3, PREDICT: 0.2, "decode": 0.5}

_seconds_per_pixel: dict[tuple[str, ...], float] = {}


def seconds_for(plan: PhasePlan) -> float | None:
    """Returns the seconds that the phase will take by the latest run with the same network, or None before one."""
    seconds = _seconds_per_pixel.get(_key(plan))
    return None if seconds is None else seconds * plan.work


def expected_times(plans: Sequence[PhasePlan]) -> list[float]:
    """Returns the times that the phases will take, in seconds or, before all were measured, in any one unit."""
    seconds = [seconds_for(plan) for plan in plans]
    if None not in seconds:
        return [second for second in seconds if second is not None]
    return [TYPICAL_SHARES[plan.cost.phase] * plan.work for plan in plans]


@contextmanager
def measured(plan: PhasePlan, region: Region | None = None) -> Iterator[None]:
    """Measures a phase that the block runs by this plan on one picture, or on a region of it; latent pixels."""
    begin = perf_counter()
    yield
    _seconds_per_pixel[_key(plan)] = (perf_counter() - begin) / plan.work_for(region or plan.tiles.whole)


def _key(plan: PhasePlan) -> tuple[str, ...]:
    cost = plan.cost
    return (cost.phase, str(cost.patcher.model_size()), str(cost.dtype), str(cost.patcher.load_device))


STEPS = 1000  # of the progress bar: one is less than the page shows
PREVIEW_SIDE = 512  # pixels of the longer side, as core's sampler previews
PREVIEW_INTERVAL = 0.5  # seconds
LEAST_COVERAGE = 1 / 64  # below it a pixel is shown as it was: dividing by less would show noise

ComfyPreview = tuple[str, Image.Image, int]  # format, picture, longest side


class Progress:
    """The node's progress bar over phases of unequal length and all pictures of a batch."""

    def __init__(self, phases: Sequence[PhasePlan], pictures: int) -> None:
        self._bar = comfy.utils.ProgressBar(STEPS)
        self._times = expected_times(phases)
        self._total = sum(self._times) * pictures
        self._done = 0.0

    def phase(self, index: int, preview: LivePreview | None = None) -> OnTiles:
        """Returns what phase `index` of the next picture calls after each batch of tiles."""
        before, time = self._done, self._times[index]

        def on_tiles(done: int, total: int, canvas: Tensor) -> None:
            self._done = before + time * done / total
            value = min(STEPS, round(STEPS * self._done / self._total))
            self._bar.update_absolute(value, preview=preview.show(done, canvas) if preview else None)

        return on_tiles


class LivePreview:
    """A small copy of one picture that turns, tile by tile, from the enlarged input into the result."""

    def __init__(
        self, enlarged: Tensor, plan: TilePlan, factor: int, finish: Network, region: Region | None = None
    ) -> None:
        """enlarged: (1, 3 or 4, H, W) in [0, 1]; the rest as in the TiledRun that decodes it."""
        region = region or plan.whole
        shown = region.scaled(factor)
        self._tiles = plan.tiles_for(region)
        self._finish = finish
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
        result = self._finish(canvas / coverage.clamp_min(LEAST_COVERAGE))[:, :RGB]
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
