"""What may be drawn when a photograph is degraded.

The defaults of `DegradationConfig` are the values of the official Real-ESRGAN configuration
(arXiv 2107.10833, section 3 and its supplement; TADSR section 4.1).
Ranges are (low, high), probabilities 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isclose, pi
from typing import Annotated, Literal, get_args

from training.config.parsing import ConfigError, Span, validate

ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

Share = Annotated[float, Span(0, 1)]
Pixels = Annotated[float, Span(1e-3, 100)]
Cutoff = Annotated[float, Span(0, pi)]
Level = Annotated[float, Span(0, 255)]
Factor = Annotated[float, Span(0, 100)]
Quality = Annotated[int, Span(1, 100)]
Range = tuple[float, float]


def _check_order(settings: object, *names: str) -> None:
    for name in names:
        low, high = getattr(settings, name)
        if low > high:
            raise ConfigError(f"{name} is {(low, high)}; accepted: low <= high")


def _check_around(settings: object, name: str, middle: float) -> None:
    low, high = getattr(settings, name)
    if not 0 < low <= middle <= high:
        raise ConfigError(f"{name} is {(low, high)}; accepted: a range around {middle}, above 0")


def _check_sum(name: str, shares: tuple[float, ...]) -> None:
    if not isclose(sum(shares), 1.0, abs_tol=1e-9):
        raise ConfigError(f"{name} are {shares}; accepted: together 1")


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if any(size < 1 or size % 2 == 0 for size in sizes):
        raise ConfigError(f"{name} are {sizes}; accepted: odd numbers from 1")


@dataclass(frozen=True, kw_only=True)
class SincConfig:
    """A circular low-pass filter, which adds the ringing of sharpening and of strong compression."""

    probability: Share = 0.1
    """Probability that the filter is used (in a blur: instead of the other kernels)."""
    large_size: int = 13
    """Kernels of at least this size may have the lower cut-off of `large_cutoff`."""
    small_cutoff: tuple[Cutoff, Cutoff] = (pi / 3, pi)
    """Cut-off of kernels under `large_size`, in radians a pixel."""
    large_cutoff: tuple[Cutoff, Cutoff] = (pi / 5, pi)
    """Cut-off of the other kernels, in radians a pixel."""

    def __post_init__(self) -> None:
        validate(self)
        _check_order(self, "small_cutoff", "large_cutoff")


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """One blur, of seven families of kernels. The six shares below divide what the sinc filter leaves."""

    probability: Share = 1.0
    """Probability that there is a blur at all."""
    sizes: tuple[int, ...] = tuple(range(7, 22, 2))
    """Kernel sizes in pixels, all equally likely; odd."""
    sinc: SincConfig = field(default_factory=SincConfig)
    """The sinc filter that replaces the families below with its probability."""
    iso: Share = 0.45
    """Share of Gaussians with one sigma."""
    aniso: Share = 0.25
    """Share of rotated Gaussians with two sigmas."""
    generalized_iso: Share = 0.12
    """Share of exp(-q^beta / 2), q the squared Mahalanobis distance, with one sigma."""
    generalized_aniso: Share = 0.03
    """Share of the same, rotated, with two sigmas."""
    plateau_iso: Share = 0.12
    """Share of 1 / (1 + q^beta) with one sigma."""
    plateau_aniso: Share = 0.03
    """Share of the same, rotated, with two sigmas."""
    sigma: tuple[Pixels, Pixels] = (0.2, 3.0)
    """Standard deviations in pixels."""
    rotation: Range = (-pi, pi)
    """Angle of the first axis of anisotropic kernels, in radians."""
    generalized_beta: Range = (0.5, 4.0)
    """Exponent of generalised Gaussians."""
    plateau_beta: Range = (1.0, 2.0)
    """Exponent of plateau kernels."""
    beta_split: float = 1.0
    """Half of the exponents are drawn below this value and half above, as in Real-ESRGAN."""

    def __post_init__(self) -> None:
        validate(self)
        _check_order(self, "sigma", "rotation")
        _check_sum("shares of the blur kernels", tuple(self.shares.values()))
        _check_sizes("blur sizes", self.sizes)
        _check_around(self, "generalized_beta", self.beta_split)
        _check_around(self, "plateau_beta", self.beta_split)

    @property
    def shares(self) -> dict[str, float]:
        """Returns the share of each family but sinc."""
        names = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """A resize by a random factor and a random interpolation."""

    up: Share = 0.2
    """Probability of a factor in 1..scale[1]."""
    down: Share = 0.7
    """Probability of a factor in scale[0]..1."""
    keep: Share = 0.1
    """Probability of the factor 1."""
    scale: Range = (0.15, 1.5)
    """Smallest and largest factor."""
    modes: tuple[ResizeMode, ...] = RESIZE_MODES
    """Interpolations, all equally likely."""
    antialias: bool = False
    """Whether bilinear and bicubic widen their kernels when shrinking (Real-ESRGAN: no)."""

    def __post_init__(self) -> None:
        validate(self)
        _check_sum("resize probabilities (up, down, keep)", (self.up, self.down, self.keep))
        _check_around(self, "scale", 1)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise, always present: Gaussian with `gaussian_probability`, else Poisson."""

    gaussian_probability: Share = 0.5
    """Probability of Gaussian noise; the rest is Poisson (shot) noise."""
    sigma: tuple[Level, Level] = (1.0, 30.0)
    """Standard deviation of Gaussian noise, of 255."""
    poisson_scale: tuple[Factor, Factor] = (0.05, 3.0)
    """Factor on Poisson noise."""
    gray_probability: Share = 0.4
    """Probability that all three channels get the same noise."""

    def __post_init__(self) -> None:
        validate(self)
        _check_order(self, "sigma", "poisson_scale")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Blur, then resize, then noise."""

    blur: BlurConfig = field(default_factory=BlurConfig)
    """The blur of this stage."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """The resize: of the photograph's size in the first stage, of the LQ image's size in the second."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The noise of this stage."""


@dataclass(frozen=True, kw_only=True)
class JpegConfig:
    """JPEG compression with chroma at half resolution."""

    probability: Share = 1.0
    """Probability that the image is compressed."""
    quality: tuple[Quality, Quality] = (30, 95)
    """Lowest and highest quality; every integer between, ends included, is equally likely."""

    def __post_init__(self) -> None:
        validate(self)
        _check_order(self, "quality")


def _second_stage() -> StageConfig:
    return StageConfig(
        blur=BlurConfig(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeConfig(up=0.3, down=0.4, keep=0.3, scale=(0.3, 1.2)),
        noise=NoiseConfig(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The whole degradation: first stage, JPEG, second stage, then resize, sinc and JPEG."""

    downscale: Annotated[int, Span(1, 64)] = 4
    """How many times smaller the LQ image is."""
    first: StageConfig | None = field(default_factory=StageConfig)
    """The first stage with the JPEG that follows it; None leaves both out."""
    first_jpeg: JpegConfig = field(default_factory=JpegConfig)
    """The JPEG after the first stage."""
    second: StageConfig = field(default_factory=_second_stage)
    """The second stage."""
    final_modes: tuple[ResizeMode, ...] = RESIZE_MODES
    """Interpolations of the resize to the final size, all equally likely."""
    final_antialias: bool = False
    """As `ResizeConfig.antialias`, for the resize to the final size."""
    final_sinc: SincConfig = field(default_factory=lambda: SincConfig(probability=0.8, large_cutoff=(pi / 3, pi)))
    """The sinc filter that follows the resize to the final size; its cut-off never goes below pi/3, as in Real-ESRGAN's
    code, whatever its size."""
    final_sinc_sizes: tuple[int, ...] = tuple(range(7, 22, 2))
    """Kernel sizes of that filter, all equally likely."""
    final_jpeg: JpegConfig = field(default_factory=JpegConfig)
    """The last JPEG."""
    jpeg_before_resize: Share = 0.5
    """Probability that the last JPEG precedes the resize to the final size."""

    def __post_init__(self) -> None:
        validate(self)
        _check_sizes("final_sinc_sizes", self.final_sinc_sizes)


FULL = DegradationConfig()

LIGHT = DegradationConfig(
    first=None,
    second=StageConfig(
        blur=BlurConfig(probability=0.5, sigma=(0.2, 1.6), sinc=SincConfig(probability=0.0)),
        resize=ResizeConfig(up=0.0, down=0.0, keep=1.0, scale=(1.0, 1.0), antialias=True),
        noise=NoiseConfig(gaussian_probability=1.0, sigma=(0.0, 8.0)),
    ),
    final_sinc=SincConfig(probability=0.0),
    final_jpeg=JpegConfig(probability=0.7, quality=(60, 100)),
    jpeg_before_resize=0.0,
)
"""Nearly clean inputs (ours): a model trained on `FULL` alone smooths clean photographs too much.
The blur's sigma is in pixels of the photograph, at most 0.4 pixels of the LQ image."""
