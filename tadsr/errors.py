"""The errors that a user of the package can cause."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that are not what they should be: wrong file, keys, shapes or version."""
