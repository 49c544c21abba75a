"""The errors of this package that a user is meant to read."""

from __future__ import annotations


class HostError(RuntimeError):
    """Setting up or talking to ComfyUI failed; the message says what failed and what to do."""


class ServerFault(HostError):
    """A server does not answer, broke off, or answered nonsense: another try, or another server, may do."""


class Stopped(HostError):
    """The program is ending, and gave up what it waited for."""
