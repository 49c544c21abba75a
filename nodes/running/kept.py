"""The decoded pictures of the last run, so that a change of only the colours runs no network again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from .pictures import StageData

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MOST_BYTES = 256 * 2**20  # a result of 4096x4096 pixels


@dataclass(frozen=True)
class RunKey:
    """What the decoded pictures depend on. Objects are the same or not; ComfyUI keeps them between runs."""

    objects: tuple[object, ...]  # held weakly where they can be
    values: tuple[object, ...]

    def same(self, other: RunKey) -> bool:
        """Returns whether both stand for one run."""
        return self.values == other.values and all(
            _held(mine) is _held(theirs) for mine, theirs in zip(self.objects, other.objects, strict=True)
        )


def run_key(objects: Sequence[object], values: Sequence[object]) -> RunKey:
    """Returns the key of a run."""
    return RunKey(tuple(item if isinstance(item, list) or item is None else ref(item) for item in objects), (*values,))


def _held(item: object) -> object:
    return item() if isinstance(item, ref) else item


_kept: WeakKeyDictionary[ModelPatcher, tuple[RunKey, list[StageData]]] = WeakKeyDictionary()  # released with the MODEL


def recall(model: ModelPatcher, key: RunKey) -> list[StageData] | None:
    """Returns what was kept of the run with this key, or None."""
    found = _kept.get(model)
    return found[1] if found is not None and found[0].same(key) else None


def keeping(model: ModelPatcher, key: RunKey, decoded: Iterable[StageData]) -> Iterator[StageData]:
    """Yields the decoded pictures of one run and, at its end, keeps them in place of those before, unless large."""
    _kept.clear()
    held, size = [], 0
    for one in decoded:
        size += sum(tensor.nbytes for tensor in (one.full, one.thumbnail) if tensor is not None)
        held = [*held, one] if size <= MOST_BYTES else []
        yield one
    if size <= MOST_BYTES:
        _kept[model] = key, held
