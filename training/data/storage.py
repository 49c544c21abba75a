"""Bytes on disk: where a file's bytes lie, reading what ends, and writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Where the bytes of a file are: a file of its own, or `size` bytes of a shard from `offset`."""

    path: str
    offset: int = 0
    size: int = -1  # -1: to the end

    def read(self) -> bytes:
        """Returns the bytes; raises OSError."""
        with open_file(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


def open_file(path: str | Path) -> BinaryIO:
    """Opens a file for reading; raises OSError, too, for what has no end: pipes, on which one waits, and devices."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def printable(name: str) -> str:
    """Returns a file's name as text that UTF-8 can hold: what is no text on disk is written with backslashes."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
