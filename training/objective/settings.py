"""The settings that the losses read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from training.config.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Those of `TrainConfig` of the same names, which says what each means."""

    seed: int
    sample_latent: bool
    timestep_grid: int
    lam: float
    gamma: float
    distillation: Literal["tavsd", "vsd", "none"]
    guidance: float
    reconstruction: Literal["blurred_mse", "mse"]
    mse_weight: float
    lpips_weight: float
    lpips_shift: int
    distillation_weight: float
    adversarial_weight: float
    gradient_checkpointing: bool

    @classmethod
    def of(cls, config: TrainConfig) -> LossSettings:
        """Returns those of a run."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})
