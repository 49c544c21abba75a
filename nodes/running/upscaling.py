"""The work of Upscale with TADSR: each phase runs over the whole batch, so that its network is loaded once."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...tadsr.geometry import Region
from .color import ColorMatch, finish, finish_part, grown
from .pictures import draw_latent, enlarge_picture, start, to_image
from .plan import UpscalePlan, regions_needed
from .progress import LivePreview, Progress, measured
from .run import Passage, PhaseRun
from .stages import PhaseNetwork


@dataclass(kw_only=True)
class Upscaling:
    """Takes pictures from phase to phase, as planned."""

    plan: UpscalePlan
    networks: tuple[PhaseNetwork, PhaseNetwork, PhaseNetwork]  # encode, predict, decode
    progress: Progress
    wanted: Region | None  # the part of the result that is wanted, pixels; None: all
    runs: list[PhaseRun] = field(init=False)
    regions: list[Region | None] = field(init=False)  # what each phase must give, latent pixels

    def __post_init__(self) -> None:
        self.runs = [PhaseRun(phase) for phase in self.plan.phases]
        self.regions = [None] * len(self.runs)
        if self.wanted is not None:
            self.regions = regions_needed(self.plan.phases, grown(self.wanted, self.plan.size), self.plan.downscale)

    def encode(self, picture: Tensor, seed: int | None) -> Passage:
        """Returns the latent of one picture of an IMAGE, (H, W, C). seed: None for the mode."""
        enlarged = enlarge_picture(picture, self.plan.size)
        moments = self._run(0, start(enlarged, self.plan.downscale, self.plan.sample))
        return moments.then(lambda values: draw_latent(values, seed))

    def predict(self, latent: Passage) -> Passage:
        """Returns the clean latent."""
        return self._run(1, latent)

    def decode(self, latent: Passage, picture: Tensor) -> Passage:
        """Returns the decoded picture, or what the wanted part of it needs, before its colours are matched.

        picture: the input, (H, W, C).
        """
        network, region = self.networks[2], self.regions[2]
        enlarged = enlarge_picture(picture, self.plan.size)
        tiles = self.plan.phases[2].tiles
        return self._run(2, latent, LivePreview(enlarged, tiles, network.result_factor, network.finish, region))

    def finish(self, decoded: Passage, picture: Tensor, match: ColorMatch) -> Tensor:
        """Returns the result, or the part of it that is wanted, as an IMAGE. picture: the input, (H, W, C)."""
        # Enlarged again rather than kept: a long batch would hold every reference at once.
        enlarged = enlarge_picture(picture, self.plan.size)
        tiles, factor = self.plan.phases[2].tiles, self.networks[2].result_factor
        if not tiles.is_whole:  # coloured as a part of it is, so that a crop preview shows what the whole will be
            at = (self.regions[2] or tiles.whole).scaled(factor)
            wanted = self.wanted or Region(0, 0, *self.plan.size)
            result = finish_part(decoded, at, wanted, enlarged, self.plan.downscale, match)
        else:
            result = finish(decoded.whole, enlarged, match)
            result = result if self.wanted is None else self.wanted.crop(result)
        del enlarged  # of a large picture, the next line would be a third copy
        return to_image(result)

    def _run(self, index: int, picture: Passage, preview: LivePreview | None = None) -> Passage:
        phase, region = self.plan.phases[index], self.regions[index]
        with measured(phase, region):
            result = self.runs[index](self.networks[index], picture, self.progress.phase(index, preview), region)
        if preview is not None:
            return result
        return result.placed(region, phase.tiles.height, phase.tiles.width)
