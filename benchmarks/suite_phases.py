"""The three phases of an upscale one by one, by the nodes' own code, each whole or in tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from host.node_pack import Pack
from tadsr.schedule import DEFAULT_TIMESTEP

SCALE = 4


@dataclass(frozen=True)
class Phase:
    """One network, ready to run over the whole picture by its plan."""

    name: str
    plan: Any  # nodes.running.plan.PhasePlan
    network: Any  # nodes.running.stages.PhaseNetwork


class Phases:
    """Encode, predict and decode for square results of `side` pixels."""

    def __init__(
        self, pack: Pack, side: int, tiles: tuple[int, int, int], *, overlap: int = 0, sample_share: float | None = None
    ) -> None:
        """tiles, overlap: pixels of the result; a tile of `side` is the whole picture, 0 the nodes' choice.

        sample_share: of the picture's pixels, for the copy that gives statistics; None for the nodes' choice.
        """
        self._module = lambda name: pack.comfy.module(name)
        plans, memory, networks = self._module("plan"), self._module("memory"), self._module("stages")
        self.size, self.downscale = (side, side), pack.encoder.downscale
        padded = plans.padded_size(*self.size, self.downscale)
        costs = (
            memory.encoder_cost(pack.encoder),
            memory.prediction_cost(pack.model),
            memory.decoder_cost(pack.vae),
        )
        conditioning = self._module("student").choose_conditioning(pack.model, None)
        made = (
            networks.encoder_network(pack.encoder, DEFAULT_TIMESTEP),
            networks.prediction_network(pack.model, DEFAULT_TIMESTEP, conditioning),
            networks.decoder_network(pack.vae),
        )
        planned = [
            plans.plan_phase(cost, *padded, tile=tile, overlap=0 if tile == side else overlap)
            for cost, tile in zip(costs, tiles, strict=True)
        ]
        if sample_share is not None:
            planned = [replace(plan, sample_area=int(sample_share * padded[0] * padded[1])) for plan in planned]
        self.phases = [Phase(plan.cost.phase, plan, network) for plan, network in zip(planned, made, strict=True)]

    def begin(self, image: Tensor) -> Any:
        """Returns an IMAGE, (1, h, w, 3), enlarged and ready for the encoder."""
        phases = self._module("pictures")
        sample = self._module("plan").sample_of([phase.plan for phase in self.phases])
        return phases.start(phases.enlarge_picture(image[0], self.size), self.downscale, sample)

    def run(self, index: int, passage: Any) -> Any:
        """Returns what phase `index` makes of the passage."""
        phase = self.phases[index]
        result = self._module("run").PhaseRun(phase.plan)(phase.network, passage, lambda *_: None)
        return (
            result.then(lambda moments: self._module("pictures").draw_latent(moments, None)) if index == 0 else result
        )

    def restore(self, image: Tensor) -> Tensor:
        """Returns the decoded picture, (1, 3, side, side) in [0, 1]: no colour match hides a difference."""
        passage = self.begin(image)
        for index in range(len(self.phases)):
            passage = self.run(index, passage)
        return passage.whole
