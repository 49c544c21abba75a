"""Finds the pictures of a batch, and where the result of each goes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HostError

PICTURES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga", ".apng", ".ico", ".psd", ".dib", ".mpo"),
}
VIDEOS = {
    *(".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".mts", ".m2ts", ".ogv", ".3gp"),
    *(".flv", ".vob"),
}
SPLIT = "ffmpeg -i VIDEO frames/%06d.png"
JOIN = "ffmpeg -framerate 25 -i OUTPUT/%06d.png -i VIDEO -map 0:v -map 1:a? -c:a copy -pix_fmt yuv420p joined.mp4"
LISTS = {".txt", ".lst", ".list"}
LONGEST_NAME = 255  # bytes, of the usual file systems
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Item:
    """One picture: its file, its name in messages and the manifest, and its result's path below the output folder."""

    source: str
    name: str
    output: str


@dataclass(frozen=True)
class Failure:
    """A picture without a result, and why, in one sentence."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.name)} {self.reason}"


@dataclass
class Inputs:
    """What was found: pictures, inputs that cannot be done, and how many other files were passed over."""

    items: list[Item] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    ignored: int = 0


def shown(name: str) -> str:
    """Returns a name on one line, with what is not text in it escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def find_inputs(inputs: Sequence[Path], output: Path, suffix: str, *, keep_suffix: bool = False) -> Inputs:
    """Returns the pictures of folders (with all below them), files and list files, in a fixed order.

    The output tree is that of the folder. A file keeps its name; a line of a list file its path, if that is relative.
    What lies in the output folder is no input. Raises HostError for an input that is not there, an output folder that
    is an input, or when there is no picture at all.
    """
    found, output = Inputs(), output.resolve()
    for path in inputs:
        if path.is_dir() and path.resolve() == output:
            raise HostError(f"the output folder {shown(str(output))} is the input folder; give another")
    taken: dict[str, str] = {}
    for source, relative in _all(inputs, output, found):
        _add(found, source, relative, suffix, keep_suffix, taken)
    if not found.items and not found.failures:
        where = ", ".join(shown(str(path)) for path in inputs)
        others = f" ({found.ignored} other files)" if found.ignored else ""
        raise HostError(f"there is no picture in {where}{others}; looked for {', '.join(sorted(PICTURES))}")
    return found


def _all(inputs: Sequence[Path], output: Path, found: Inputs) -> Iterator[tuple[str, str]]:
    """Yields (file, path that its result should have)."""
    for path in inputs:
        if path.is_dir():
            yield from _of_folder(path, output, found)
        elif path.suffix.lower() in LISTS and path.is_file():
            yield from _of_list(path)
        elif os.path.lexists(path):
            yield str(path), path.name
        else:
            raise HostError(f"there is no file or folder {shown(str(path))}")


def _of_folder(folder: Path, output: Path, found: Inputs) -> Iterator[tuple[str, str]]:
    for here, folders, files in os.walk(folder, onerror=lambda error: found.failures.append(_unread(error, folder))):
        folders[:] = sorted((name for name in folders if Path(here, name).resolve() != output), key=_natural)
        for name in sorted(files, key=_natural):
            path = os.path.join(here, name)
            if os.path.splitext(name)[1].lower() in PICTURES | VIDEOS:
                yield path, os.path.relpath(path, folder)
            else:
                found.ignored += 1


def _unread(error: OSError, folder: Path) -> Failure:
    return Failure(os.path.relpath(error.filename, folder), f"is a folder that cannot be read: {error.strerror}")


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _of_list(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the paths of a list file: one a line, or ended by NUL bytes (find -print0) where names hold newlines."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise HostError(f"the list {file} cannot be read: {error.strerror}") from error
    for line in content.split(b"\0") if b"\0" in content else content.splitlines():
        if line.strip():
            path = os.fsdecode(line)
            inside = os.path.normpath(path)
            outside = os.path.isabs(path) or inside.startswith("..")
            yield path, os.path.basename(inside) if outside else inside


def _add(found: Inputs, source: str, relative: str, suffix: str, keep_suffix: bool, taken: dict[str, str]) -> None:
    stem, ending = os.path.splitext(relative)
    output = (relative if keep_suffix else stem) + suffix
    reason = _refusal(source, ending, output)
    other = taken.setdefault(os.path.normcase(output), source)
    if reason is None and other != source:
        reason = f"would be written to {shown(output)}, as {shown(other)} is: rename one, or give --keep-suffix"
    if reason is not None:
        found.failures.append(Failure(relative, reason))
        return
    found.items.append(Item(source, relative, output))


def _refusal(source: str, ending: str, output: str) -> str | None:
    if ending.lower() in VIDEOS:
        return f"is a video: split it ({SPLIT}), give the folder frames, and join the results ({JOIN})"
    if not os.path.isfile(source):
        return "is no regular file" if os.path.lexists(source) else "is not there"
    if len(os.fsencode(os.path.basename(output))) > LONGEST_NAME:
        return f"would get a name of more than {LONGEST_NAME} bytes: shorten it"
    return None
