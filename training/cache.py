"""The per-user cache folder of what is fetched and computed once, and a lock on things in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout  # torch itself needs this package

CACHE_VARIABLE = "TADSR_CACHE"  # the same folder as that of this repository's programs, `host.cache`


def cache_directory() -> Path:
    """Returns the folder, made if it is not there: $TADSR_CACHE, else `tadsr` in the platform's per-user place."""
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
    """Holds a lock for `path` (a file `<path>.lock` beside it), waiting, and saying so, for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {path}; waiting for it ...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
