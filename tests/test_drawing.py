from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drawing import AREAS, MOST, SCALE, SIZE, draw, shifts
from benchmarks.quality import WEIGHTS
from training.images import to_picture, to_tensor
from training.networks.inference import Restorer


def test_areas_are_measured_in_their_colours() -> None:
    assert draw().shape == (SIZE, SIZE, 3)
    assert set(shifts(draw(), 1).values()) == {0.0}
    assert set(shifts(draw().repeat(3, 0).repeat(3, 1), 3).values()) == {0.0}


@pytest.mark.parametrize("channel", range(3))
def test_a_colour_that_moves_is_seen_where_it_does(channel: int) -> None:
    moved = draw().astype(int)
    left, top, right, bottom = AREAS[1].box
    moved[top:bottom, left:right, channel] -= 5
    assert shifts(moved, 1) == {area.name: 5.0 if area is AREAS[1] else 0.0 for area in AREAS}


def test_specks_move_the_mean() -> None:
    specks = draw().copy()
    left, top, right, bottom = AREAS[0].box
    specks[top:bottom, left:right][np.random.default_rng(0).random((bottom - top, right - left)) < 0.05] = 0
    assert 5 < shifts(specks, 1)["sky"] < 20


def test_the_bundled_model_keeps_flat_colours() -> None:
    restorer = Restorer.load(WEIGHTS)
    assert restorer.color_match == "wavelet"
    for timestep in (100, 500, 900):
        result = np.asarray(to_picture(restorer(to_tensor(draw()), timestep, SCALE)))
        moved = shifts(result, SCALE)
        assert max(moved.values()) <= MOST, f"timestep {timestep}: {moved}"
