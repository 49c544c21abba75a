"""The three stages of an upscale one by one, by the nodes' own code, each whole or in tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from host.node_pack import Pack
from tadsr.schedule import DEFAULT_TIMESTEP

SCALE = 4


class Stages:
    """Encode, predict and decode for square results of `side` pixels."""

    def __init__(
        self,
        pack: Pack,
        side: int,
        tiles: tuple[int, int, int],
        *,
        overlap: int = 0,
        thumbnail_share: float | None = None,
    ) -> None:
        """tiles, overlap: pixels of the result; a tile of `side` is the whole picture, 0 the nodes' choice.

        thumbnail_share: of the picture's pixels, for the copy that gives statistics; None for the nodes' choice.
        """
        self._module = pack.comfy.module
        plans = self._module("plan")
        conditioning = self._module("student").choose_conditioning(pack.model, None)
        stages = self._module("stages").upscale_stages(pack.model, pack.encoder, pack.vae, conditioning)
        padded = plans.padded_size(side, side, pack.encoder.downscale)
        planned = [
            plans.plan_stage(stage, *padded, tile=tile, overlap=0 if tile == side else overlap)
            for stage, tile in zip(stages, tiles, strict=True)
        ]
        if thumbnail_share is not None:
            area = int(thumbnail_share * padded[0] * padded[1])
            planned = [replace(one, thumbnail_area=area) for one in planned]
        self.plan = plans.Plan((side, side), tuple(planned))

    def begin(self, image: Tensor) -> Any:
        """Returns an IMAGE, (1, h, w, 3), enlarged and ready for the encoder."""
        pictures, plan = self._module("pictures"), self.plan
        enlarged = pictures.enlarge_picture(image[0], plan.size)
        return pictures.to_encoder_input(enlarged, DEFAULT_TIMESTEP, plan.downscale, plan.thumbnail)

    def run(self, index: int, data: Any) -> Any:
        """Returns what stage `index` makes of a picture."""
        run, planned = self._module("run"), self.plan.stages[index]
        result = run.StageRun(planned, run.tiler_for(planned), data)(lambda *_: None)
        if index:
            return result
        return result.then(lambda moments: self._module("pictures").draw_latent(moments, None))

    def restore(self, image: Tensor) -> Tensor:
        """Returns the decoded picture, (1, 3, side, side) in [0, 1]: no colour match hides a difference."""
        data = self.begin(image)
        for index in range(len(self.plan.stages)):
            data = self.run(index, data)
        return data.full
