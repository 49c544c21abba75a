"""The per-user cache directory, and a lock on things in it that works between processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CACHE_VARIABLE = "TADSR_CACHE"


def cache_directory() -> Path:
    """Returns this project's cache directory, creating it: $TADSR_CACHE, else the platform's per-user place."""
    override = os.environ.get(CACHE_VARIABLE)
    path = Path(override).expanduser() if override else _platform_cache() / "tadsr"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds an exclusive lock for `path` (a file `<path>.lock` beside it), waiting for other processes.

    The operating system drops the lock when its holder dies, so a crash never leaves it behind.
    """
    lock_file = path.with_name(path.name + ".lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a+b") as handle:
        _acquire(handle, path)
        try:
            yield
        finally:
            _release(handle)


def held_by_nobody(path: Path) -> bool:
    """Returns whether no process holds the lock of `path` now."""
    lock_file = path.with_name(path.name + ".lock")
    if not lock_file.exists():
        return True
    with lock_file.open("a+b") as handle:
        if not _try(handle):
            return False
        _release(handle)
    return True


if sys.platform == "win32":
    import msvcrt
    import time

    _POLL_SECONDS = 0.5

    def _try(handle: IO[bytes]) -> bool:
        try:
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _acquire(handle: IO[bytes], path: Path) -> None:
        announced = False
        while not _try(handle):
            announced = announced or _announce(path)
            time.sleep(_POLL_SECONDS)

    def _release(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try(handle: IO[bytes]) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _acquire(handle: IO[bytes], path: Path) -> None:
        if not _try(handle):
            _announce(path)
            fcntl.flock(handle, fcntl.LOCK_EX)

    def _release(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _announce(path: Path) -> bool:
    print(f"Another process is preparing {path}; waiting for it ...", flush=True)
    return True
