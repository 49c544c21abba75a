"""The pictures of a batch in main memory: one result that they are written into, and whether there is room for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import comfy.model_management as mm
import psutil
import torch
from torch import Tensor

from ...tadsr.geometry import Region
from ..compat import intermediate_dtype
from .kept import MOST_BYTES
from .memory import MEGABYTE
from .pictures import RGB

FLOAT32 = 4  # bytes
# Pictures in float32 that finishing one holds at a time, in Lab or by wavelets: python -m benchmarks.batch_memory
WORKING_COPIES = 10
LESS = "Upscale fewer pictures at a time, or choose a smaller size; python batch.py takes a folder picture by picture"


class Collected:
    """Finished pictures of a batch, each written into one tensor: a list of them would take twice its memory."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self._whole = torch.empty(0)

    def add(self, picture: Tensor) -> None:
        """Takes the next picture, (1, ...), of the first one's shape and type."""
        if self._count == 1:
            self._whole = picture
        else:
            if not self._done:
                self._whole = picture.new_empty(self._count, *picture.shape[1:])
            self._whole[self._done] = picture[0]
        self._done += 1

    @property
    def whole(self) -> Tensor:
        """All pictures, once each was added: (count, ...)."""
        assert self._done == self._count, f"{self._done} of {self._count} pictures"
        return self._whole


def collected(pictures: Iterable[Tensor], count: int) -> Tensor:
    """Returns pictures, (1, ...) each, as one tensor (count, ...)."""
    result = Collected(count)
    for picture in pictures:
        result.add(picture)
        del picture  # else it would be held while the next one is made
    return result.whole


@dataclass(frozen=True)
class BatchMemory:
    """What a batch of results takes of the memory that nodes keep pictures in."""

    size: tuple[int, int]  # (height, width) of a result, pixels
    pictures: int
    channels: int  # of the input
    wanted: Region | None = None  # the part of the result that is wanted, pixels

    @property
    def result_bytes(self) -> int:
        """Bytes of the result."""
        height, width = self.size if self.wanted is None else (self.wanted.height, self.wanted.width)
        return self.pictures * self._channels * height * width * mm.dtype_size(intermediate_dtype())

    @property
    def bytes(self) -> int:
        """Bytes at the peak: the result, what is kept of it, and the picture in work. Latents are small beside them."""
        kept = min(self.result_bytes, MOST_BYTES)
        return self.result_bytes + kept + WORKING_COPIES * self._channels * FLOAT32 * self.size[0] * self.size[1]

    @property
    def _channels(self) -> int:
        return max(RGB, self.channels)

    @property
    def free(self) -> int:
        """Bytes that are free there."""
        return max(0, int(mm.get_free_memory(mm.intermediate_device())))

    def warnings(self) -> list[str]:
        """Returns a line if it does not fit."""
        return [] if self.bytes <= self.free else [f"Warning: {self._too_large()}"]

    def check(self) -> None:
        """Raises MemoryError where there is no room, on disk (swap) either, for what the whole run will end with."""
        swap = psutil.swap_memory().free if mm.is_device_cpu(mm.intermediate_device()) else 0
        if self.bytes > self.free + swap:
            raise MemoryError(f"out of memory, before any work: {self._too_large()}")

    def _too_large(self) -> str:
        height, width = self.size
        several = f"{self.pictures} pictures" if self.pictures > 1 else "one picture"
        return (
            f"the result, {several} of {width}x{height} pixels, takes {self.bytes / MEGABYTE:.0f} MB of main memory "
            f"with what is needed to make it, and {self.free / MEGABYTE:.0f} MB are free. {LESS}"
        )

    def line(self) -> str:
        """Returns a line about it."""
        return (
            f"Main memory: {self.bytes / MEGABYTE:.0f} MB for pictures, {self.result_bytes / MEGABYTE:.0f} MB of them "
            f"the result; {self.free / MEGABYTE:.0f} MB are free"
        )
