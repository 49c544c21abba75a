from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.artefacts import (
    DIRECTIONS,
    PERIODS,
    compare,
    grid_strengths,
    lattice_row,
    size_faults,
    sky,
    spectrum,
    write_sky,
)
from tadsr.schedule import MIN_TIMESTEP
from training.metrics.reference import LUMA
from training.networks.inference import Restorer

HEIGHT, WIDTH = 96, 128
GREY_TO_LUMA = sum(LUMA)


def textured(seed: int = 0) -> Tensor:
    """A picture like a photograph: more energy the lower the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH)[None])
    values = np.fft.ifft2(np.fft.fft2(rng.standard_normal((HEIGHT, WIDTH))) / (frequency + 0.02)).real
    scaled = 0.5 + 0.1 * values / values.std()
    return torch.from_numpy(scaled).float().clamp(0, 1).expand(1, 3, -1, -1)


def pattern(period: int, direction: str, amplitude: float) -> Tensor:
    """A wave of grey, `amplitude` in 1/255."""
    rows, columns = (torch.cos(2 * torch.pi / period * torch.arange(side)) for side in (HEIGHT, WIDTH))
    waves = {"rows": rows[:, None], "columns": columns[None], "both": rows[:, None] * columns[None]}
    return (amplitude / 255 * waves[direction]).expand(1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pattern_is_found_where_it_is(period: int, direction: str) -> None:
    truths = [textured(seed) for seed in range(4)]
    results = [truth + pattern(period, direction, 5) for truth in truths]
    findings = {finding.period: finding for finding in compare(results, truths)}
    assert findings[period].is_grid and findings[period].direction == direction
    assert not any(finding.is_grid for p, finding in findings.items() if p != period)


def test_amplitudes_are_those_of_the_pattern() -> None:
    for period, direction in ((2, "rows"), (4, "columns"), (8, "rows"), (2, "both")):
        strengths = grid_strengths(spectrum(0.5 + pattern(period, direction, 3)))
        amplitude = strengths[PERIODS.index(period), DIRECTIONS.index(direction), 1]
        assert amplitude == pytest.approx(3 * GREY_TO_LUMA, rel=1e-3)


def test_nothing_is_found_in_other_textures_nor_below_rounding() -> None:
    textures = [textured(seed) for seed in range(24)]
    assert not any(finding.is_grid for finding in compare(textures[:12], textures[12:]))
    small = sky(HEIGHT, WIDTH)
    assert grid_strengths(spectrum(small))[..., 0].max() < 1.3
    assert not any(finding.is_grid for finding in compare([small + pattern(4, "both", 0.1)], [small]))


def test_a_weave_is_seen_that_is_no_single_frequency() -> None:
    truths = [textured(seed) for seed in range(4)]
    middle = torch.zeros(1, 1, HEIGHT, WIDTH)
    middle[..., 1::4, 1::4] = 1
    woven = [truth + 0.1 * middle * torch.randn(1, 1, HEIGHT, WIDTH) for truth in truths]
    assert lattice_row("textures", 500, truths, truths)[1] is False
    row, seen = lattice_row("textures", 500, woven, truths)
    assert seen and row.startswith("| textures | 500 | ") and row.endswith("| LATTICE |")


def test_the_sky_is_the_same_in_any_size() -> None:
    large = sky(64, 96)
    assert torch.nn.functional.avg_pool2d(large, 4).sub(sky(16, 24)).abs().max() < 1e-5
    assert 0.3 < large.min() and large.max() <= 1


def test_wrong_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="20x16; accepted: sides that are multiples of 8"):
        grid_strengths(np.ones((16, 20)))


def test_sizes_of_the_bundled_model_are_exact(repository: Path) -> None:
    restorer = Restorer.load(repository / "weights" / "tadsr-mini.safetensors")
    assert list(size_faults(restorer, ((1, 1), (1, 7), (33, 20)))) == []
    with torch.no_grad():
        next(iter(restorer.decoder.parameters())).fill_(float("nan"))
    faults = list(size_faults(restorer, ((5, 6),)))
    assert faults[0] == f"6x5 at timestep {MIN_TIMESTEP} has numbers that are not finite"


def test_the_sky_is_written(tmp_path: Path) -> None:
    truth = sky(HEIGHT, WIDTH)
    write_sky(tmp_path / "new" / "sky.png", truth + pattern(4, "rows", 2), truth)
    assert Image.open(tmp_path / "new" / "sky.png").width > 3 * WIDTH
