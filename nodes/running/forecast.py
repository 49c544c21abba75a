"""What a run will take, told from its plan: tiles, memory, seconds, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from ...tadsr.tiling import SMALLEST_TILE
from .memory import MEGABYTE, MORE_MEMORY, can_be_free
from .plan import PhasePlan, UpscalePlan
from .progress import seconds_for

MEGAPIXEL = 1e6
MINUTE = 60  # seconds
UNKNOWN_TIME = (
    "not known yet. Run Upscale with TADSR once with this model, on a small picture if you like, and estimate "
    "again: from then on the time is known until ComfyUI ends"
)


@dataclass(frozen=True)
class Forecast:
    """What upscaling a batch of pictures by one plan will take."""

    plan: UpscalePlan
    pictures: int

    @property
    def tiles(self) -> int:
        """Tiles of one picture in all phases together."""
        return sum(len(phase.tiles.tiles) for phase in self.plan.phases)

    @property
    def peak_bytes(self) -> int:
        """Bytes on the networks' device at the peak: the weights and the activations of one network."""
        return max(phase.cost.patcher.model_size() + self.activations(phase) for phase in self.plan.phases)

    @property
    def seconds(self) -> float | None:
        """Seconds for all pictures on this machine; None before all networks have run once."""
        times = [seconds_for(phase) for phase in self.plan.phases]
        known = [time for time in times if time is not None]
        return None if len(known) < len(times) else sum(known) * self.pictures

    def activations(self, phase: PhasePlan) -> int:
        """Returns the bytes of activations at the phase's peak: of its tiles, or of the sample for their statistics."""
        return phase.cost.bytes_for(self._pixels(phase))

    def fits(self, phase: PhasePlan) -> bool:
        """Returns whether there is memory for the phase, other models moved out if need be."""
        # Planned within what was free a moment ago; what is free now may be a little less.
        planned_to_fit = phase.area > SMALLEST_TILE**2 and phase.area >= self._pixels(phase)
        return planned_to_fit or self.activations(phase) <= _free(phase)

    def warnings(self) -> list[str]:
        """Returns a line for each phase that does not fit: what it needs, what is free, what to do."""
        return [_warning(phase, self.activations(phase)) for phase in self.plan.phases if not self.fits(phase)]

    def report(self) -> str:
        """Returns everything as lines of text, what matters most first: a node shows two until it is enlarged."""
        height, width = self.plan.size
        result = f"Result: {width}x{height} pixels, {height * width / MEGAPIXEL:.2g} megapixels"
        if self.pictures > 1:
            result += f"; {self.pictures} pictures, one after the other"
        device = self.plan.phases[0].cost.patcher.load_device
        seconds = self.seconds
        return "\n".join(
            [
                result,
                *self.warnings(),
                f"Time: {UNKNOWN_TIME if seconds is None else _duration(seconds)}",
                f"Peak memory: {self.peak_bytes / MEGABYTE:.0f} MB on {device}, weights included",
                *(self._line(phase) for phase in self.plan.phases),
            ]
        )

    def _line(self, phase: PhasePlan) -> str:
        tiles, side = phase.tiles, phase.cost.downscale
        if tiles.is_whole:
            how = "the whole picture at once"
        else:
            how = (
                f"{len(tiles.tiles)} tiles of {tiles.tile_width * side}x{tiles.tile_height * side} pixels that overlap "
                f"by {tiles.overlap * side}, {phase.batch} at a time"
            )
        weights = phase.cost.patcher.model_size() / MEGABYTE
        memory = self.activations(phase) / MEGABYTE
        return f"{phase.cost.phase.capitalize()}: {how}; {memory:.0f} MB beside {weights:.0f} MB of weights"

    def _pixels(self, phase: PhasePlan) -> int:
        """Returns the latent pixels that go through the phase's network at a time, at most."""
        return phase.pixels if phase.tiles.is_whole else max(phase.pixels, self.plan.sample_pixels)


def _free(phase: PhasePlan) -> int:
    return can_be_free(phase.cost.patcher)


def _warning(phase: PhasePlan, activations: int) -> str:
    device, free = phase.cost.patcher.load_device, max(0, _free(phase))
    smallest = max(phase.tiles.tile_height, phase.tiles.tile_width) <= SMALLEST_TILE
    return (
        f"Warning: it does not fit. To {phase.cost.phase} needs about {activations / MEGABYTE:.0f} MB beside the "
        f"weights, and {device} has {free / MEGABYTE:.0f} MB free for it. "
        + (f"The tiles are the smallest. {MORE_MEMORY}" if smallest else "Choose a smaller tile, or 0 (automatic)")
    )


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"about {seconds:.1f} seconds"
    return f"about {seconds // MINUTE:.0f} min {seconds % MINUTE:.0f} s"
