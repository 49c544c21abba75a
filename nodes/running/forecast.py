"""What a run will take, told from its plan: tiles, memory, seconds, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from ...tadsr.tiling import SMALLEST_TILE
from .batch import BatchMemory
from .memory import MEGABYTE, MORE_MEMORY, free_if_all_unloaded
from .plan import Plan, StagePlan
from .progress import seconds_for

MEGAPIXEL = 1e6
MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds
UNKNOWN_TIME = (
    "not known yet. Run Upscale with TADSR once with this model, on a small picture if you like, and estimate "
    "again: from then on the time is known until ComfyUI ends"
)


@dataclass(frozen=True)
class Forecast:
    """What upscaling a batch of pictures by one plan will take."""

    plan: Plan
    batch: BatchMemory

    @property
    def pictures(self) -> int:
        """Pictures in the batch."""
        return self.batch.pictures

    @property
    def tiles(self) -> int:
        """Tiles of one picture in all stages together."""
        return sum(len(planned.tiles.tiles) for planned in self.plan.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes on the networks' device at the peak: the weights and the activations of one network."""
        return max(planned.stage.patcher.model_size() + self.activations(planned) for planned in self.plan.stages)

    @property
    def seconds(self) -> float | None:
        """Seconds for all pictures on this machine; None before all networks have run once."""
        times = [seconds_for(planned) for planned in self.plan.stages]
        known = [time for time in times if time is not None]
        return None if len(known) < len(times) else sum(known) * self.pictures

    def activations(self, planned: StagePlan) -> int:
        """Returns the bytes of activations at the stage's peak: of its tiles or their thumbnail."""
        return planned.stage.bytes_for(self._pixels(planned))

    def fits(self, planned: StagePlan) -> bool:
        """Returns whether there is memory for the stage, other models moved out if need be."""
        # Planned within what was free a moment ago; what is free now may be a little less.
        planned_to_fit = planned.area > SMALLEST_TILE**2 and planned.area >= self._pixels(planned)
        return planned_to_fit or self.activations(planned) <= _free(planned)

    def warnings(self) -> list[str]:
        """Returns a line for each stage, and for the batch, that does not fit: what it needs, what is free."""
        stages = [planned for planned in self.plan.stages if not self.fits(planned)]
        return [*(_warning(planned, self.activations(planned)) for planned in stages), *self.batch.warnings()]

    def report(self) -> str:
        """Returns everything as lines of text, what matters most first: a node shows two until it is enlarged."""
        height, width = self.plan.size
        result = f"Result: {width}x{height} pixels, {height * width / MEGAPIXEL:.2g} megapixels"
        if self.pictures > 1:
            result += f"; {self.pictures} pictures, one after the other"
        device = self.plan.stages[0].stage.patcher.load_device
        seconds = self.seconds
        return "\n".join(
            [
                result,
                *self.warnings(),
                f"Time: {UNKNOWN_TIME if seconds is None else _duration(seconds)}",
                f"Peak memory: {self.peak_bytes / MEGABYTE:.0f} MB on {device}, weights included",
                self.batch.line(),
                *(self._line(planned) for planned in self.plan.stages),
            ]
        )

    def _line(self, planned: StagePlan) -> str:
        tiles, side = planned.tiles, planned.stage.downscale
        if tiles.is_whole:
            how = "the whole picture at once"
        else:
            how = (
                f"{len(tiles.tiles)} tiles of {tiles.tile_width * side}x{tiles.tile_height * side} pixels that overlap "
                f"by {tiles.overlap * side}, {planned.batch} at a time"
            )
        weights = planned.stage.patcher.model_size() / MEGABYTE
        memory = self.activations(planned) / MEGABYTE
        return f"{planned.stage.name.capitalize()}: {how}; {memory:.0f} MB beside {weights:.0f} MB of weights"

    def _pixels(self, planned: StagePlan) -> int:
        """Returns the latent pixels that go through the stage's network at a time, at most."""
        return planned.pixels if planned.tiles.is_whole else max(planned.pixels, self.plan.thumbnail_pixels)


def _free(planned: StagePlan) -> int:
    return free_if_all_unloaded(planned.stage.patcher)


def _warning(planned: StagePlan, activations: int) -> str:
    device, free = planned.stage.patcher.load_device, max(0, _free(planned))
    smallest = max(planned.tiles.tile_height, planned.tiles.tile_width) <= SMALLEST_TILE
    return (
        f"Warning: it does not fit. To {planned.stage.name} needs about {activations / MEGABYTE:.0f} MB beside the "
        f"weights, and {device} has {free / MEGABYTE:.0f} MB free for it. "
        + (f"The tiles are the smallest. {MORE_MEMORY}" if smallest else "Choose a smaller tile, or 0 (automatic)")
    )


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"about {seconds:.1f} seconds"
    if seconds < HOUR:
        return "about {} min {} s".format(*divmod(round(seconds), MINUTE))
    if seconds < DAY:
        return "about {} h {} min".format(*divmod(round(seconds / MINUTE), HOUR // MINUTE))
    return "about {} days {} h".format(*divmod(round(seconds / HOUR), DAY // HOUR))
