"""What was drawn for one photograph: everything of a degradation but the noise of each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .config import (
    FULL,
    BlurConfig,
    DegradationConfig,
    JpegConfig,
    NoiseConfig,
    Range,
    ResizeConfig,
    SincConfig,
    StageConfig,
)

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class KernelParameters:
    """A blur kernel. Fields that its family does not use keep their defaults."""

    family: str
    """sinc, or a name of `BlurConfig.shares`."""
    size: int
    """Side in pixels, odd."""
    sigma_x: float = 1.0
    """Standard deviation along the rotated first axis, in pixels."""
    sigma_y: float = 1.0
    """Standard deviation along the second axis; equal to `sigma_x` in isotropic kernels."""
    rotation: float = 0.0
    """Angle of the first axis in radians."""
    beta: float = 1.0
    """Exponent of generalised Gaussian and plateau kernels."""
    cutoff: float = 0.0
    """Cut-off of sinc kernels in radians a pixel."""


@dataclass(frozen=True, kw_only=True)
class ResizeParameters:
    """A resize by `scale` (of a size that the stage defines)."""

    scale: float
    mode: str
    antialias: bool


@dataclass(frozen=True, kw_only=True)
class NoiseParameters:
    """Noise: `gaussian` with a sigma of 255 as strength, or `poisson` with a factor as strength."""

    kind: str
    strength: float
    gray: bool


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """One stage; no kernel means no blur."""

    kernel: KernelParameters | None
    resize: ResizeParameters
    noise: NoiseParameters


@dataclass(frozen=True, kw_only=True)
class DegradationParameters:
    """All that `draw_parameters` drew; a quality of None means no JPEG."""

    downscale: int
    first: StageParameters | None
    first_quality: int | None
    second: StageParameters
    final_mode: str
    final_antialias: bool
    final_kernel: KernelParameters | None
    final_quality: int | None
    jpeg_before_resize: bool


def draw_parameters(rng: np.random.Generator, config: DegradationConfig = FULL) -> DegradationParameters:
    """Returns the parameters of one degradation; the same state of `rng` gives the same parameters."""
    return DegradationParameters(
        downscale=config.downscale,
        first=None if config.first is None else draw_stage(rng, config.first),
        first_quality=None if config.first is None else draw_quality(rng, config.first_jpeg),
        second=draw_stage(rng, config.second),
        final_mode=_pick(rng, config.final_modes),
        final_antialias=config.final_antialias,
        final_kernel=_draw_final_kernel(rng, config),
        final_quality=draw_quality(rng, config.final_jpeg),
        jpeg_before_resize=_happens(rng, config.jpeg_before_resize),
    )


def draw_stage(rng: np.random.Generator, config: StageConfig) -> StageParameters:
    """Returns the parameters of one stage."""
    return StageParameters(
        kernel=draw_kernel(rng, config.blur) if _happens(rng, config.blur.probability) else None,
        resize=draw_resize(rng, config.resize),
        noise=draw_noise(rng, config.noise),
    )


def draw_kernel(rng: np.random.Generator, config: BlurConfig) -> KernelParameters:
    """Returns a kernel of one of the seven families."""
    size = _pick(rng, config.sizes)
    if _happens(rng, config.sinc.probability):
        return _draw_sinc(rng, size, config.sinc)
    family = _pick_weighted(rng, config.shares)
    sigma_x = _uniform(rng, config.sigma)
    isotropic = family == "iso" or family.endswith("_iso")
    return KernelParameters(
        family=family,
        size=size,
        sigma_x=sigma_x,
        sigma_y=sigma_x if isotropic else _uniform(rng, config.sigma),
        rotation=0.0 if isotropic else _uniform(rng, config.rotation),
        beta=_draw_beta(rng, family, config),
    )


def draw_resize(rng: np.random.Generator, config: ResizeConfig) -> ResizeParameters:
    """Returns a resize up, down or not at all."""
    direction = _pick_weighted(rng, {"up": config.up, "down": config.down, "keep": config.keep})
    ranges = {"up": (1.0, config.scale[1]), "down": (config.scale[0], 1.0), "keep": (1.0, 1.0)}
    return ResizeParameters(
        scale=_uniform(rng, ranges[direction]), mode=_pick(rng, config.modes), antialias=config.antialias
    )


def draw_noise(rng: np.random.Generator, config: NoiseConfig) -> NoiseParameters:
    """Returns Gaussian or Poisson noise."""
    gaussian = _happens(rng, config.gaussian_probability)
    return NoiseParameters(
        kind="gaussian" if gaussian else "poisson",
        strength=_uniform(rng, config.sigma if gaussian else config.poisson_scale),
        gray=_happens(rng, config.gray_probability),
    )


def draw_quality(rng: np.random.Generator, config: JpegConfig) -> int | None:
    """Returns a JPEG quality, or None for no JPEG."""
    if not _happens(rng, config.probability):
        return None
    return int(rng.integers(config.quality[0], config.quality[1], endpoint=True))


def _draw_final_kernel(rng: np.random.Generator, config: DegradationConfig) -> KernelParameters | None:
    if not _happens(rng, config.final_sinc.probability):
        return None
    return _draw_sinc(rng, _pick(rng, config.final_sinc_sizes), config.final_sinc)


def _draw_sinc(rng: np.random.Generator, size: int, config: SincConfig) -> KernelParameters:
    cutoff = config.small_cutoff if size < config.large_size else config.large_cutoff
    return KernelParameters(family="sinc", size=size, cutoff=_uniform(rng, cutoff))


def _draw_beta(rng: np.random.Generator, family: str, config: BlurConfig) -> float:
    if not family.startswith(("generalized", "plateau")):
        return 1.0
    low, high = config.generalized_beta if family.startswith("generalized") else config.plateau_beta
    below = _happens(rng, 0.5)
    return _uniform(rng, (low, config.beta_split) if below else (config.beta_split, high))


def _happens(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _uniform(rng: np.random.Generator, bounds: Range) -> float:
    return float(rng.uniform(*bounds))


def _pick(rng: np.random.Generator, values: Sequence[Value]) -> Value:
    return values[int(rng.integers(len(values)))]


def _pick_weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    position = rng.random()
    names = [name for name, weight in weights.items() if weight > 0]
    for name in names:
        position -= weights[name]
        if position < 0:
            return name
    return names[-1]
