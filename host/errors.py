"""The errors of this package that a user is meant to read."""

from __future__ import annotations


class HostError(RuntimeError):
    """Setting up or talking to ComfyUI failed; the message says what failed and what to do."""


class ServerFault(HostError):
    """A server does not answer, broke off, or answered nonsense: another try, or another server, may do."""


class BrokeOff(ServerFault):
    """A server went away while it ran a picture: perhaps because of the picture."""


class Unusable(HostError):
    """A server answers, but can never do what is asked: it lacks a node, a file, or a version."""


class Stopped(HostError):
    """The program is ending, and gave up what it waited for."""
