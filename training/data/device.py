"""Degrades pictures on the training device, where the workers have only drawn how."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.geometry import enlarge
from training.data.batches import Batch
from training.degradation import degrade_batch
from training.randomness import sample_generator


@torch.no_grad()
def degraded(batch: Batch, lq: Tensor, hq: Tensor, seed: int) -> Tensor:
    """Returns `lq` with those samples degraded and enlarged whose degradation is still to be applied.

    lq, hq: the batch's images, (B, 3, H, W) in [-1, 1], on the device; seed: the run's, for the noise.
    """
    places = [place for place, degradation in enumerate(batch.degradations) if degradation is not None]
    if not places:
        return lq
    drawn = [degradation for degradation in batch.degradations if degradation is not None]
    seeds = [sample_generator(seed, "degradation", batch.indices[place]).initial_seed() for place in places]
    small = degrade_batch(hq[places] / 2 + 0.5, drawn, seeds)
    lq = lq.clone()
    lq[places] = enlarge(small, (hq.shape[2], hq.shape[3])) * 2 - 1
    return lq
