"""What is drawn for a degradation, against the table of Real-ESRGAN's configuration."""

from __future__ import annotations

from math import pi

import numpy as np
import pytest
from scipy import stats

from training.degradation import FULL, LIGHT, DegradationConfig, DegradationParameters, draw_parameters
from training.degradation.config import BlurConfig, JpegConfig, NoiseConfig, ResizeConfig, SincConfig
from training.degradation.parameters import KernelParameters, NoiseParameters

DRAWS = 2000
LEAST_P = 5e-3  # with fixed seeds: a failure means that the distribution changed, not bad luck

BLUR_SHARES = {  # sinc 0.1, else the others
    "sinc": 0.1,
    "iso": 0.9 * 0.45,
    "aniso": 0.9 * 0.25,
    "generalized_iso": 0.9 * 0.12,
    "generalized_aniso": 0.9 * 0.03,
    "plateau_iso": 0.9 * 0.12,
    "plateau_aniso": 0.9 * 0.03,
}
SIZES = dict.fromkeys(range(7, 22, 2), 1 / 8)
MODES = dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3)


@pytest.fixture(scope="module")
def draws() -> list[DegradationParameters]:
    rng = np.random.default_rng(7)
    return [draw_parameters(rng, FULL) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def light_draws() -> list[DegradationParameters]:
    rng = np.random.default_rng(8)
    return [draw_parameters(rng, LIGHT) for _ in range(DRAWS)]


def check_shares(what: str, values: list, shares: dict) -> None:
    counts = [values.count(name) for name in shares]
    assert sum(counts) == len(values), f"{what}: values outside {set(shares)}: {set(values) - set(shares)}"
    p = stats.chisquare(counts, np.array(list(shares.values())) * len(values)).pvalue
    assert p > LEAST_P, f"{what}: counts {counts} against shares {shares}, p {p:.2g}"


def check_uniform(what: str, values: list[float], low: float, high: float) -> None:
    assert low <= min(values) <= max(values) <= high, f"{what}: outside {low}..{high}"
    p = stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue
    assert p > LEAST_P, f"{what}: not uniform in {low}..{high}, p {p:.2g}"


def check_cutoffs(what: str, kernels: list[KernelParameters], lowest_of_large: float) -> None:
    check_uniform(f"{what}, small", [k.cutoff for k in kernels if k.size < 13], pi / 3, pi)
    check_uniform(f"{what}, large", [k.cutoff for k in kernels if k.size >= 13], lowest_of_large, pi)


def check_kernels(kernels: list[KernelParameters], sigma: tuple[float, float]) -> None:
    check_shares("families", [k.family for k in kernels], BLUR_SHARES)
    check_shares("sinc", [k.family == "sinc" for k in kernels], {True: 0.1, False: 0.9})
    check_shares("sizes", [k.size for k in kernels], SIZES)
    check_cutoffs("sinc", [k for k in kernels if k.family == "sinc"], pi / 5)
    gaussian = [k for k in kernels if k.family != "sinc"]
    turned = [k for k in gaussian if k.family.endswith("aniso")]
    straight = [k for k in gaussian if not k.family.endswith("aniso")]
    assert all(k.beta == 1 for k in gaussian if k.family in ("iso", "aniso"))
    assert all(k.sigma_x == k.sigma_y and k.rotation == 0 for k in straight)
    check_uniform("sigma x", [k.sigma_x for k in gaussian], *sigma)
    check_uniform("sigma y", [k.sigma_y for k in turned], *sigma)
    check_uniform("rotation", [k.rotation for k in turned], -pi, pi)
    for family, low, high in (("generalized", 0.5, 4.0), ("plateau", 1.0, 2.0)):
        betas = [k.beta for k in gaussian if k.family.startswith(family)]
        assert min(betas) >= low, f"{family}: beta below {low}"
        above = [beta for beta in betas if beta > 1]
        check_shares(f"{family}: beta above 1", [beta > 1 for beta in betas], {True: 0.5, False: 0.5})
        check_uniform(f"{family}: beta above 1", above, 1.0, high)
        if low < 1:
            check_uniform(f"{family}: beta below 1", [beta for beta in betas if beta <= 1], low, 1.0)


def check_scales(scales: list[float], shares: tuple[float, float, float], low: float, high: float) -> None:
    directions = ["up" if s > 1 else "down" if s < 1 else "keep" for s in scales]
    check_shares("directions", directions, dict(zip(("up", "down", "keep"), shares, strict=True)))
    check_uniform("up", [s for s in scales if s > 1], 1, high)
    check_uniform("down", [s for s in scales if s < 1], low, 1)


def check_noise(noises: list[NoiseParameters], sigma: float, poisson: float) -> None:
    check_shares("noise", [n.kind for n in noises], {"gaussian": 0.5, "poisson": 0.5})
    check_shares("gray", [n.gray for n in noises], {True: 0.4, False: 0.6})
    check_uniform("sigma", [n.strength for n in noises if n.kind == "gaussian"], 1, sigma)
    check_uniform("poisson scale", [n.strength for n in noises if n.kind == "poisson"], 0.05, poisson)


def test_first_stage_is_drawn_as_in_the_table(draws: list[DegradationParameters]) -> None:
    stages = [d.first for d in draws if d.first is not None]
    kernels = [s.kernel for s in stages if s.kernel is not None]
    assert len(stages) == len(kernels) == DRAWS
    assert not any(s.resize.antialias for s in stages)
    check_kernels(kernels, (0.2, 3.0))
    check_scales([s.resize.scale for s in stages], (0.2, 0.7, 0.1), 0.15, 1.5)
    check_shares("modes", [s.resize.mode for s in stages], MODES)
    check_noise([s.noise for s in stages], 30, 3.0)
    check_shares("JPEG", [d.first_quality for d in draws], dict.fromkeys(range(30, 96), 1 / 66))


def test_second_stage_is_drawn_as_in_the_table(draws: list[DegradationParameters]) -> None:
    stages = [d.second for d in draws]
    assert not any(s.resize.antialias for s in stages)
    check_shares("blur", [s.kernel is not None for s in stages], {True: 0.8, False: 0.2})
    check_kernels([s.kernel for s in stages if s.kernel is not None], (0.2, 1.5))
    check_scales([s.resize.scale for s in stages], (0.3, 0.4, 0.3), 0.3, 1.2)
    check_shares("modes", [s.resize.mode for s in stages], MODES)
    check_noise([s.noise for s in stages], 25, 2.5)


def test_final_steps_are_drawn_as_in_the_table(draws: list[DegradationParameters]) -> None:
    kernels = [d.final_kernel for d in draws if d.final_kernel is not None]
    assert {k.family for k in kernels} == {"sinc"}
    assert {(d.downscale, d.final_antialias) for d in draws} == {(4, False)}
    check_shares("sinc", [d.final_kernel is not None for d in draws], {True: 0.8, False: 0.2})
    check_shares("sizes", [k.size for k in kernels], SIZES)
    check_cutoffs("final sinc", kernels, pi / 3)
    check_shares("order", [d.jpeg_before_resize for d in draws], {True: 0.5, False: 0.5})
    check_shares("modes", [d.final_mode for d in draws], MODES)
    check_shares("JPEG", [d.final_quality for d in draws], dict.fromkeys(range(30, 96), 1 / 66))


def test_parameters_are_drawn_independently_of_each_other(draws: list[DegradationParameters]) -> None:
    columns = {
        "first sigma": [d.first.kernel.sigma_x if d.first and d.first.kernel else 0.0 for d in draws],
        "first scale": [d.first.resize.scale if d.first else 0.0 for d in draws],
        "first quality": [d.first_quality for d in draws],
        "second scale": [d.second.resize.scale for d in draws],
        "second noise is Gaussian": [d.second.noise.kind == "gaussian" for d in draws],
        "second noise is gray": [d.second.noise.gray for d in draws],
        "final sinc": [d.final_kernel is not None for d in draws],
        "final quality": [d.final_quality for d in draws],
        "order": [d.jpeg_before_resize for d in draws],
    }
    names = list(columns)
    found = stats.spearmanr(np.array([columns[name] for name in names], dtype=float).T)
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    least = min(pairs, key=lambda pair: found.pvalue[pair])
    assert found.pvalue[least] > LEAST_P / len(pairs), f"{[names[i] for i in least]} are correlated"


def test_light_preset_is_drawn_as_documented(light_draws: list[DegradationParameters]) -> None:
    stages = [d.second for d in light_draws]
    qualities = [d.final_quality for d in light_draws]
    assert all(d.first is None and d.final_kernel is None and d.first_quality is None for d in light_draws)
    assert {(s.resize.scale, s.resize.antialias, s.noise.kind) for s in stages} == {(1.0, True, "gaussian")}
    check_shares("blur", [s.kernel is not None for s in stages], {True: 0.5, False: 0.5})
    kernels = [s.kernel for s in stages if s.kernel is not None]
    check_shares("families", [k.family for k in kernels], LIGHT.second.blur.shares)
    check_uniform("sigma of the blur", [k.sigma_x for k in kernels], 0.2, 1.6)
    check_shares("modes", [s.resize.mode for s in stages], MODES)
    check_uniform("sigma", [s.noise.strength for s in stages], 0, 8)
    check_shares("JPEG", [quality is not None for quality in qualities], {True: 0.7, False: 0.3})
    check_shares("quality", [q for q in qualities if q is not None], dict.fromkeys(range(60, 101), 1 / 41))


def test_changed_config_changes_what_is_drawn() -> None:
    config = DegradationConfig(final_jpeg=JpegConfig(quality=(50, 50)), jpeg_before_resize=1.0)
    drawn = [draw_parameters(np.random.default_rng(seed), config) for seed in range(20)]
    assert {d.final_quality for d in drawn} == {50}
    assert all(d.jpeg_before_resize for d in drawn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurConfig(iso=0.5), "shares"),
        (lambda: BlurConfig(sizes=(8,)), "odd"),
        (lambda: BlurConfig(sigma=(0.0, 1.0)), "sigma"),
        (lambda: BlurConfig(plateau_beta=(1.5, 2.0)), "plateau_beta"),
        (lambda: SincConfig(probability=1.5), "probability"),
        (lambda: ResizeConfig(up=0.5), "up, down, keep"),
        (lambda: ResizeConfig(scale=(0.0, 1.0)), "scale"),
        (lambda: ResizeConfig(modes=("nearest",)), "nearest"),  # pyright: ignore[reportArgumentType]
        (lambda: NoiseConfig(sigma=(5.0, 1.0)), "sigma"),
        (lambda: JpegConfig(quality=(0, 95)), "quality"),
        (lambda: DegradationConfig(downscale=0), "downscale"),
        (lambda: DegradationConfig(final_modes=("lanczos",)), "lanczos"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_impossible_configs_are_refused(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
