"""Lets a program that is asked to end do so as after Ctrl-C: with its servers stopped and its folders removed."""

from __future__ import annotations

import signal
import sys
from types import FrameType

_NAMES = ("SIGTERM", "SIGHUP")
_BASE = 128  # a shell's exit code for a signal is this and its number


def end_in_order() -> None:
    """Makes SIGTERM and SIGHUP raise SystemExit, once, and SIGINT KeyboardInterrupt.

    A shell that starts jobs in the background makes them ignore SIGINT, which is how Ctrl-C arrives.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the cleaning up is not to be interrupted
    sys.exit(_BASE + number)
