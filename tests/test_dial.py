"""Lists of timesteps as people write them, and mixtures of pictures."""

from __future__ import annotations

import pytest
import torch

from tadsr.dial import mix_neighbours, parse_timesteps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", (500,)),
        ("100, 500, 900", (100, 500, 900)),
        (" 1,999, ", (1, 999)),
        ("100..900 step 200", (100, 300, 500, 700, 900)),
        ("100-900 step 300", (100, 400, 700)),
        ("1..3", (1, 2, 3)),
        ("1, 100..300 step 100, 999", (1, 100, 200, 300, 999)),
        ("100\n500", (100, 500)),
    ],
)
def test_lists_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert parse_timesteps(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "are 0 timesteps; accepted are 1 to 64"),
        (" , ", "are 0 timesteps"),
        ("1..65", "are 65 timesteps; accepted are 1 to 64"),
        ("500, 100", "from 500 to 100; accepted are ascending"),
        ("100, 100", "from 100 to 100; accepted are ascending timesteps, each once"),
        ("low, high", "'low' is no timestep; accepted is a list such as"),
        ("100.5", "is no timestep"),
        ("-5", "is no timestep"),
        ("900..100", "is an empty range"),
        ("1..9 step 0", "is an empty range"),
        ("0, 500", "accepted are the integers 1..999"),
        ("500, 1000", "accepted are the integers 1..999"),
        ("1..99999999", "are 99999999 timesteps; accepted are 1 to 64"),
    ],
)
def test_what_is_no_list_of_timesteps_is_said(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error.replace("(", r"\(")):
        parse_timesteps(text)


def test_a_position_between_two_pictures_mixes_them() -> None:
    pictures = torch.stack([torch.full((2, 3, 3), value) for value in (0.0, 0.4, 1.0)])
    for position, value in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.4), (0.75, 0.7), (1.0, 1.0)):
        mixed = mix_neighbours(pictures, position)
        assert mixed.shape == (1, 2, 3, 3)
        assert torch.allclose(mixed, torch.tensor(value)), position


@pytest.mark.parametrize("position", [-0.1, 1.1, float("nan")])
def test_a_position_outside_is_said(position: float) -> None:
    with pytest.raises(ValueError, match="accepted are 0"):
        mix_neighbours(torch.zeros(2, 4, 4, 3), position)


def test_one_picture_is_nothing_to_blend() -> None:
    with pytest.raises(ValueError, match="there is 1 picture"):
        mix_neighbours(torch.zeros(1, 4, 4, 3), 0.5)
