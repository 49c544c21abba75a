"""The record of a batch: one JSON line for each result, which lets the same command go on where it was stopped.

A result's line is written, and is on the disk, before the result gets its name. So a killed run leaves a line without
a result (made again) or a result with its line (done), and never a result that nobody knows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache import exclusive, held_by_nobody
from ..errors import HostError
from .inputs import Item

NAME = "tadsr-manifest.jsonl"
PART_PREFIX = ".tadsr-part-"
RECHECKED = 128  # of the last lines, whose results may have been in flight when a run was killed
_BLOCK = 2**20


@dataclass(frozen=True)
class Entry:
    """A finished picture: what went in, by which settings (a digest) and weights, what came out, where, how long."""

    input: str
    input_sha256: str
    input_bytes: int
    input_mtime_ns: int
    settings: str
    weights: str | None
    output: str
    output_sha256: str
    output_bytes: int
    seconds: float
    server: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    """What of an entry decides whether its picture is done."""

    input_sha256: str
    input_bytes: int
    input_mtime_ns: int
    settings: str
    weights: str | None
    output_bytes: int
    output_sha256: str | None  # only of the last ones, whose results are looked at


class Manifest:
    """The manifest of an output folder, as a context manager that keeps other batches out of the folder.

    Raises HostError when another one works in it, or its manifest is not one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._known: dict[str, _Known] = {}
        self._settings: set[str] = set()
        self._writing = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Manifest:
        lock = self.folder / f".{NAME}"
        if not held_by_nobody(lock):
            raise HostError(f"another batch is writing to {self.folder}; wait for it, or give another output folder")
        self._open.enter_context(exclusive(lock))
        self._read()
        self._clear_parts()
        self._file = self._open.enter_context(self.path.open("ab", buffering=0))
        if self._file.tell() and not self._ends_with_newline():
            self._file.write(b"\n")  # after a line that was cut off
        return self

    def __exit__(self, *_: object) -> None:
        self._clear_parts()
        self._open.close()

    def _clear_parts(self) -> None:
        """Removes what was half written, here or by an actor that was killed."""
        for part in self.folder.rglob(f"{PART_PREFIX}*"):
            part.unlink(missing_ok=True)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a kill or a power cut
            if not isinstance(record, dict):
                raise HostError(f"{self.path} is not a manifest of this program: line {number + 1} is {line[:40]!r}")
            if "prompt" in record:
                self._settings.add(record["settings"])
            elif "output" in record:
                self._known[record["output"]] = _known(record, recent=len(lines) - number <= RECHECKED)

    def is_done(self, item: Item, settings: str, weights: str | None) -> bool:
        """Returns whether the item's result is there, of the same input, settings and (where known) weights."""
        known = self._known.get(item.output)
        if known is None or known.settings != settings:
            return False
        if None not in (weights, known.weights) and weights != known.weights:
            return False
        return self._same_output(item, known) and _same_input(item, known)

    def _same_output(self, item: Item, known: _Known) -> bool:
        path = self.folder / item.output
        if not path.is_file() or path.stat().st_size != known.output_bytes:
            return False
        return known.output_sha256 is None or file_digest(path) == known.output_sha256

    def is_foreign(self, item: Item) -> bool:
        """Returns whether something that no batch made lies where the item's result should go."""
        return item.output not in self._known and os.path.lexists(self.folder / item.output)

    def describe(self, digest: str, settings: Mapping[str, Any]) -> None:
        """Writes what a digest of settings stands for, once."""
        if digest not in self._settings:
            self._settings.add(digest)
            self._append({"settings": digest, **settings})

    def keep(self, entry: Entry, part: Path) -> None:
        """Records a finished picture and gives its file the name of the result, both safe from a power cut."""
        self._append({**asdict(entry), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        target = self.folder / entry.output
        part.replace(target)
        sync_folder(target.parent)

    def _append(self, record: Mapping[str, Any]) -> None:
        """Writes a line that is on the disk when this returns; leaves nothing of it if that fails."""
        line = json.dumps(record).encode() + b"\n"
        with self._writing:
            start = self._file.tell()
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(start)
                raise


def _known(record: Mapping[str, Any], recent: bool) -> _Known:
    return _Known(
        record["input_sha256"],
        record["input_bytes"],
        record["input_mtime_ns"],
        record["settings"],
        record.get("weights"),
        record["output_bytes"],
        record["output_sha256"] if recent else None,
    )


def _same_input(item: Item, known: _Known) -> bool:
    """Returns whether the file is the same: by size and time, else by its content."""
    try:
        found = os.stat(item.source)
    except OSError:
        return False  # said when its turn comes
    if found.st_size != known.input_bytes:
        return False
    return found.st_mtime_ns == known.input_mtime_ns or file_digest(Path(item.source)) == known.input_sha256


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Returns a digest of settings that does not depend on their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder safe from a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
