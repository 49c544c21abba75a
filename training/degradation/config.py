"""What may be drawn when a photograph is degraded.

The defaults of `DegradationConfig` are the values of the official Real-ESRGAN configuration
(arXiv 2107.10833, section 3 and its supplement; TADSR section 4.1).
Ranges are (low, high), probabilities 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isclose, pi

Range = tuple[float, float]

RESIZE_MODES = ("area", "bilinear", "bicubic")


def _check_range(name: str, value: Range, low: float, high: float) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} is {value}; accepted: low <= high, both within {low}..{high}")


def _check_sum(name: str, probabilities: Iterable[float]) -> None:
    values = tuple(probabilities)
    if min(values) < 0 or not isclose(sum(values), 1.0, abs_tol=1e-9):
        raise ValueError(f"{name} are {values}; accepted: none negative, together 1")


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"{name} are {sizes}; accepted: odd numbers from 1")


def _check_modes(name: str, modes: tuple[str, ...]) -> None:
    if not modes or not set(modes) <= set(RESIZE_MODES):
        raise ValueError(f"{name} are {modes}; accepted: one or more of {RESIZE_MODES}")


@dataclass(frozen=True, kw_only=True)
class SincConfig:
    """A circular low-pass filter, which adds the ringing of sharpening and of strong compression."""

    probability: float = 0.1
    """Probability that the filter is used (in a blur: instead of the other kernels)."""
    large_size: int = 13
    """Kernels of at least this size may have the lower cut-off of `large_cutoff`."""
    small_cutoff: Range = (pi / 3, pi)
    """Cut-off of kernels under `large_size`, in radians a pixel."""
    large_cutoff: Range = (pi / 5, pi)
    """Cut-off of the other kernels, in radians a pixel."""

    def __post_init__(self) -> None:
        _check_range("sinc probability", (0.0, self.probability), 0, 1)
        _check_range("sinc small_cutoff", self.small_cutoff, 0, pi)
        _check_range("sinc large_cutoff", self.large_cutoff, 0, pi)


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """One blur, of seven families of kernels. The six shares below divide what the sinc filter leaves."""

    probability: float = 1.0
    """Probability that there is a blur at all."""
    sizes: tuple[int, ...] = tuple(range(7, 22, 2))
    """Kernel sizes in pixels, all equally likely; odd."""
    sinc: SincConfig = field(default_factory=SincConfig)
    """The sinc filter that replaces the families below with its probability."""
    iso: float = 0.45
    """Share of Gaussians with one sigma."""
    aniso: float = 0.25
    """Share of rotated Gaussians with two sigmas."""
    generalized_iso: float = 0.12
    """Share of exp(-q^beta / 2), q the squared Mahalanobis distance, with one sigma."""
    generalized_aniso: float = 0.03
    """Share of the same, rotated, with two sigmas."""
    plateau_iso: float = 0.12
    """Share of 1 / (1 + q^beta) with one sigma."""
    plateau_aniso: float = 0.03
    """Share of the same, rotated, with two sigmas."""
    sigma: Range = (0.2, 3.0)
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
        _check_range("blur probability", (0.0, self.probability), 0, 1)
        _check_range("blur sigma", self.sigma, 1e-3, 100)
        _check_sum("shares of the blur kernels", self.shares.values())
        _check_sizes("blur sizes", self.sizes)
        for name in ("generalized_beta", "plateau_beta"):
            low, high = getattr(self, name)
            if not 0 < low <= self.beta_split <= high:
                raise ValueError(f"{name} is ({low}, {high}); accepted: a range around {self.beta_split}")

    @property
    def shares(self) -> dict[str, float]:
        """Returns the share of each family but sinc."""
        names = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """A resize by a random factor and a random interpolation."""

    up: float = 0.2
    """Probability of a factor in 1..scale[1]."""
    down: float = 0.7
    """Probability of a factor in scale[0]..1."""
    keep: float = 0.1
    """Probability of the factor 1."""
    scale: Range = (0.15, 1.5)
    """Smallest and largest factor."""
    modes: tuple[str, ...] = RESIZE_MODES
    """Interpolations, all equally likely."""
    antialias: bool = False
    """Whether bilinear and bicubic widen their kernels when shrinking (Real-ESRGAN: no)."""

    def __post_init__(self) -> None:
        _check_sum("resize probabilities (up, down, keep)", (self.up, self.down, self.keep))
        if not 0 < self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(f"resize scale is {self.scale}; accepted: a range around 1, above 0")
        _check_modes("resize modes", self.modes)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise, always present: Gaussian with `gaussian_probability`, else Poisson."""

    gaussian_probability: float = 0.5
    """Probability of Gaussian noise; the rest is Poisson (shot) noise."""
    sigma: Range = (1.0, 30.0)
    """Standard deviation of Gaussian noise, of 255."""
    poisson_scale: Range = (0.05, 3.0)
    """Factor on Poisson noise."""
    gray_probability: float = 0.4
    """Probability that all three channels get the same noise."""

    def __post_init__(self) -> None:
        _check_range("gaussian_probability", (0.0, self.gaussian_probability), 0, 1)
        _check_range("gray_probability", (0.0, self.gray_probability), 0, 1)
        _check_range("noise sigma", self.sigma, 0, 255)
        _check_range("poisson_scale", self.poisson_scale, 0, 100)


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

    probability: float = 1.0
    """Probability that the image is compressed."""
    quality: tuple[int, int] = (30, 95)
    """Lowest and highest quality; every integer between, ends included, is equally likely."""

    def __post_init__(self) -> None:
        _check_range("JPEG probability", (0.0, self.probability), 0, 1)
        _check_range("JPEG quality", self.quality, 1, 100)


def _second_stage() -> StageConfig:
    return StageConfig(
        blur=BlurConfig(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeConfig(up=0.3, down=0.4, keep=0.3, scale=(0.3, 1.2)),
        noise=NoiseConfig(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The whole degradation: first stage, JPEG, second stage, then resize, sinc and JPEG."""

    downscale: int = 4
    """How many times smaller the LQ image is."""
    first: StageConfig | None = field(default_factory=StageConfig)
    """The first stage with the JPEG that follows it; None leaves both out."""
    first_jpeg: JpegConfig = field(default_factory=JpegConfig)
    """The JPEG after the first stage."""
    second: StageConfig = field(default_factory=_second_stage)
    """The second stage."""
    final_modes: tuple[str, ...] = RESIZE_MODES
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
    jpeg_before_resize: float = 0.5
    """Probability that the last JPEG precedes the resize to the final size."""

    def __post_init__(self) -> None:
        if self.downscale < 1:
            raise ValueError(f"downscale is {self.downscale}; accepted: integers from 1")
        _check_modes("final_modes", self.final_modes)
        _check_sizes("final_sinc_sizes", self.final_sinc_sizes)
        _check_range("jpeg_before_resize", (0.0, self.jpeg_before_resize), 0, 1)


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
