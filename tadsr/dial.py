"""The dial: lists of timesteps as people write them, and mixtures of what different timesteps gave."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .schedule import check_timestep

MOST_TIMESTEPS = 64
LIST_EXAMPLES = '"100, 500, 900" or "100..900 step 200"'
_RANGE = re.compile(r"(\d{1,9})\s*(?:\.\.|-)\s*(\d{1,9})(?:\s*step\s*(\d{1,9}))?")


def parse_timesteps(text: str) -> tuple[int, ...]:
    """Returns the timesteps of a text such as "100, 500, 900" or "100..900 step 200", ascending.

    Ranges include their end where a step reaches it; lists and ranges may be mixed. Raises ValueError for anything
    else, for no or more than 64 timesteps, for timesteps outside 1..999, and where they do not ascend.
    """
    parts = [_parse_part(part.strip(), text) for part in re.split(r"[,;\n]", text) if part.strip()]
    count = sum(len(part) for part in parts)  # before a long range is written out
    if not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"timesteps {text!r} are {count} timesteps; accepted are 1 to {MOST_TIMESTEPS}")
    values = [value for part in parts for value in part]
    for before, after in zip(values, values[1:], strict=False):
        if after <= before:
            raise ValueError(
                f"timesteps {text!r} go from {before} to {after}; accepted are ascending timesteps, each once"
            )
    return tuple(check_timestep(value) for value in values)


def _parse_part(part: str, text: str) -> range | list[int]:
    if part.isdecimal():
        return [int(part)]
    found = _RANGE.fullmatch(part)
    if found is None:
        raise ValueError(f"timesteps {text!r}: {part!r} is no timestep; accepted is a list such as {LIST_EXAMPLES}")
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
    if step == 0 or last < first:
        raise ValueError(f"timesteps {text!r}: {part!r} is an empty range; accepted is a list such as {LIST_EXAMPLES}")
    return range(first, last + 1, step)


def mix_neighbours(pictures: Tensor, position: float) -> Tensor:
    """Returns the picture at a position between the first and the last: (B, ...) -> (1, ...).

    pictures: at least two. position: 0..1, 0 the first and 1 the last; between two neighbours both are mixed, value by
    value. Raises ValueError for one picture, and for a position outside 0..1.
    """
    if len(pictures) < 2:
        raise ValueError(f"there is {len(pictures)} picture to blend; accepted are two or more: the images of a sweep")
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"position is {position:g}; accepted are 0 (the first picture) to 1 (the last)")
    place = position * (len(pictures) - 1)
    first = min(int(place), len(pictures) - 2)
    return torch.lerp(pictures[first : first + 1], pictures[first + 1 : first + 2], place - first)
