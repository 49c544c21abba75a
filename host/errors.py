"""The one error of this package that a user is meant to read."""

from __future__ import annotations


class HostError(RuntimeError):
    """Setting up or talking to ComfyUI failed; the message says what failed and what to do."""
