"""Which part of the result a crop preview shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...tadsr.geometry import Region, enlarge


def preview_region(
    size: tuple[int, int], side: int, place: tuple[float, float] = (0.5, 0.5), mask: Tensor | None = None
) -> Region | None:
    """Returns the part of a result of `size` (height, width) that is wanted, in pixels; None for the whole.

    side: of a square, at most the picture's; 0 for the whole or, with a mask, for the mask's box. place: (x, y) of its
    centre in fractions of width and height. mask: (1, h, w) or (h, w) in 0..1 of the input; the centre of its box takes
    the place of `place`. The part is moved inside where it would stand out. Raises ValueError for a negative side, a
    place outside 0..1, and an empty mask.
    """
    if side < 0:
        raise ValueError(f"preview_size is {side}; accepted are 0 (the whole result) and more")
    if not all(0.0 <= fraction <= 1.0 for fraction in place):
        raise ValueError(
            f"preview_x is {place[0]:g} and preview_y {place[1]:g}; accepted are 0 (left, top) to 1 (right, bottom)"
        )
    if mask is None:
        if side == 0:
            return None
        return _around(size, (place[1] * size[0], place[0] * size[1]), (side, side))
    box = _box(mask, size)
    centre = (box.top + box.height / 2, box.left + box.width / 2)
    return _around(size, centre, (side, side) if side else (box.height, box.width))


def _around(size: tuple[int, int], centre: tuple[float, float], wanted: tuple[int, int]) -> Region:
    height, width = (min(side, length) for side, length in zip(wanted, size, strict=True))
    top, left = (
        min(max(0, math.ceil(middle - side / 2 - 0.5)), length - side)  # a half goes to the left, to the top
        for middle, side, length in zip(centre, (height, width), size, strict=True)
    )
    return Region(top, left, height, width)


def _box(mask: Tensor, size: tuple[int, int]) -> Region:
    """Returns the smallest rectangle around the mask, at the result's size."""
    if mask.numel() == 0:
        raise ValueError(f"preview_mask has the shape {tuple(mask.shape)}; accepted is a mask of the input, (1, h, w)")
    planes = mask.reshape(-1, 1, *mask.shape[-2:])[:1].float()
    if not planes.isfinite().all():
        raise ValueError("preview_mask holds NaN or infinite values; accepted are numbers from 0 to 1")
    if not (planes > 0.5).any():
        raise ValueError("preview_mask is empty; accepted is a mask of the input with something painted in it")
    painted = enlarge(planes, size)[0, 0] > 0.5
    rows, columns = (torch.nonzero(painted.any(dim)).flatten() for dim in (1, 0))
    if len(rows) == 0:
        raise ValueError("preview_mask is too small to be seen in the result; accepted is a mask of some pixels")
    top, left = int(rows[0]), int(columns[0])
    return Region(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)
