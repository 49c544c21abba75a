"""Temporary base directories of ComfyUI servers, and the clearing of those whose owner was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

from .cache import exclusive, held_by_nobody

PREFIX = "tadsr-comfyui-"
OWNER_FILE = "owner"


class TemporaryBase:
    """A new directory below the system's temporary one, removed by `close`.

    Its owner holds a lock on a file in it, which the operating system drops when the owner dies, however it dies;
    making another one clears the folders whose lock nobody holds.
    """

    def __init__(self) -> None:
        with exclusive(_register()):
            clear_abandoned()
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
            lock = ExitStack()
            lock.enter_context(exclusive(self.path / OWNER_FILE))
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Removes the directory; never follows a link in it."""
        self._remove()


def _remove(folder: Path, lock: ExitStack) -> None:
    lock.close()
    shutil.rmtree(folder, ignore_errors=True)


def _register() -> Path:
    """The file whose lock is held while folders are made or cleared, one for each user."""
    user = os.getuid() if os.name == "posix" else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"{PREFIX}folders-{user}"


def clear_abandoned() -> None:
    """Removes this user's base directories whose owner is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.is_dir() and _is_mine(folder) and held_by_nobody(folder / OWNER_FILE):
            shutil.rmtree(folder, ignore_errors=True)


def _is_mine(folder: Path) -> bool:
    return not folder.is_symlink() and (os.name != "posix" or folder.stat().st_uid == os.getuid())
