"""Ctrl-C and SIGTERM, which let a step end before they end the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """Whether the run was asked to end."""

    requested: bool = False


@contextmanager
def catching_signals() -> Iterator[Interrupt]:
    """Gives what Ctrl-C and SIGTERM set; a second Ctrl-C raises KeyboardInterrupt. Main thread only."""
    interrupt = Interrupt()

    def request(number: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
