"""A batch's results stand in memory once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from host.comfy_in_process import InProcessComfy


def test_pictures_are_written_into_one_result(comfy_inprocess: InProcessComfy) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def pictures() -> Iterator[Tensor]:
        for value in range(5):
            assert sum(one() is not None for one in seen) == 0, "a picture was kept while the next one is made"
            picture = torch.full((1, 4, 6, 3), float(value))
            seen.append(weakref.ref(picture))
            yield picture
            del picture
            gc.collect()

    result = comfy_inprocess.module("batch").collected(pictures(), 5)
    assert result.shape == (5, 4, 6, 3) and result[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_one_picture_is_not_copied(comfy_inprocess: InProcessComfy) -> None:
    picture = torch.zeros(1, 2, 2, 3)
    assert comfy_inprocess.module("batch").collected(iter([picture]), 1) is picture


def test_a_picture_of_another_size_is_an_error(comfy_inprocess: InProcessComfy) -> None:
    with pytest.raises(RuntimeError, match="size"):
        comfy_inprocess.module("batch").collected(iter([torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 3, 3)]), 2)
