"""The actor of a Ray cluster: a ComfyUI of its own on one GPU, and the pictures that go through it."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ..carrier import Carrier
from ..errors import BrokeOff, HostError, ServerFault, Stopped, Unusable
from ..interpreter import Runtime, chosen_comfyui, prepare_comfyui
from ..pictures import PictureError
from .lanes import OwnLane
from .making import Made, Order

_KINDS: tuple[type[HostError], ...] = (PictureError, Unusable, Stopped, BrokeOff, ServerFault, HostError)


@dataclass(frozen=True)
class Outcome:
    """What became of a call: a result, or the kind of an error and its words, which travel as they are."""

    made: Made | None = None
    kind: str = ""
    words: str = ""
    number: int = 0

    def result(self) -> Made | None:
        """Returns the result, or raises the error."""
        if self.kind == OSError.__name__:
            raise OSError(self.number, self.words)
        for kind in _KINDS:
            if kind.__name__ == self.kind:
                raise kind(self.words)
        return self.made


def failed(error: HostError | OSError) -> Outcome:
    """Returns an error as an outcome."""
    if isinstance(error, OSError):
        return Outcome(kind=OSError.__name__, words=error.strerror or str(error), number=error.errno or 0)
    kind = next(kind for kind in _KINDS if isinstance(error, kind))
    return Outcome(kind=kind.__name__, words=str(error))


class Maker:
    """Makes pictures for a driver; calls of it run in threads, and open its ComfyUI when they first need it.

    A restarted actor is a new one of these, so a call that Ray repeats on it finds what it needs.
    """

    def __init__(self, carrier: Carrier, models: Path | None, slots: int, timeout: float) -> None:
        self._arguments = (carrier, models, slots, timeout)
        self._lane: OwnLane | None = None
        self._opening = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def open(self) -> Outcome:
        """Starts ComfyUI, or starts it again where it has died."""
        try:
            self._opened(anew=True)
        except (HostError, OSError) as error:
            return failed(error)
        return Outcome()

    def make(self, order: Order, slot: int, ticket: str) -> Outcome:
        """Makes one picture; `give_up(ticket)` ends it."""
        stop = self._stops.setdefault(ticket, threading.Event())
        try:
            return Outcome(self._opened().make(order, slot, stop))
        except (HostError, OSError) as error:
            return failed(error)
        finally:
            self._stops.pop(ticket, None)

    def give_up(self, ticket: str) -> None:
        """Ends a `make` whose result nobody wants."""
        if ticket in self._stops:
            self._stops[ticket].set()

    def close(self) -> None:
        """Stops ComfyUI."""
        if self._lane is not None:
            self._lane.close()

    def _opened(self, anew: bool = False) -> OwnLane:
        carrier, models, slots, timeout = self._arguments
        with self._opening:
            if self._lane is None or anew:
                runtime = chosen_runtime()
                options = {"models": models, "slots": slots, "timeout": timeout, "python": runtime.python}
                lane = self._lane or OwnLane(runtime.comfyui, carrier, **options)
                lane.open()
                self._lane = lane
            return self._lane


def chosen_runtime() -> Runtime:
    """Returns the ComfyUI that this node was started with (`host.ray_node`), else prepares one."""
    comfyui = chosen_comfyui()
    return Runtime(comfyui, Path(sys.executable)) if comfyui else prepare_comfyui()
