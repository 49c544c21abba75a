"""The errors that a user of the package can cause, and the one place that makes them of whatever a reader raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class WeightsError(ValueError):
    """Weights that are not what they should be: wrong file, keys, shapes or version."""

    names_file = False  # whether its text says which file is at fault: set by `reading`


@contextmanager
def reading(path: object, accepted: str) -> Iterator[None]:
    """Turns whatever fails while `path` is read into one WeightsError that names it and what is accepted.

    Memory that runs out stays what it is: the file is not to blame for it.
    """
    try:
        yield
    except WeightsError as error:
        text = CONTROL.sub(" ", str(error))  # of a file's keys
        if error.names_file or str(path) in text:
            raise _named(text) from error
        raise _named(f"{path}: {text}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise _named(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise _named(
            f"{path}: it is a damaged, incomplete or foreign file ({_first_sentence(error)}): get it again; accepted "
            f"is {accepted}"
        ) from error


def _named(text: str) -> WeightsError:
    error = WeightsError(text)
    error.names_file = True
    return error


def _first_sentence(error: Exception) -> str:
    sentence = re.split(r"\. |\n", str(error).strip())[0][:200]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
