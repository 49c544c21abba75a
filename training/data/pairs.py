"""Pairs of pictures listed in a text file, in the official format: a line `HQ LQ tags` for each pair."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from training.data.pictures import Catalogue, DataError, Picture, PictureError, Skipped, in_threads, read_size
from training.data.storage import ByteRange

FIELD = r"""(?:"([^"]+)"|'([^']+)'|([^\s"']\S*))"""  # a path with spaces is quoted
SPACED_LINE = re.compile(rf"{FIELD}\s+{FIELD}(?:\s+(.*))?")
ACCEPTED = "`HQ LQ tags`, separated by tabs, or by spaces with quotes around paths that have spaces"
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class PairLine:
    """One line of the list: paths as written, and the tags, which may be empty."""

    number: int  # counted from 1
    hq: str
    lq: str
    tags: str


def parse_line(line: str, number: int) -> PairLine:
    """Returns the parts of one line; raises DataError if there are fewer than two paths."""
    if "\t" in line:
        hq, _, rest = line.partition("\t")
        lq, _, tags = rest.partition("\t")
        hq, lq = _unquote(hq), _unquote(lq)
    else:
        match = SPACED_LINE.fullmatch(line.strip())
        groups = match.groups(default="") if match else ("",) * 7
        hq, lq, tags = "".join(groups[:3]), "".join(groups[3:6]), groups[6]
    if not hq or not lq:
        raise DataError(f"line {number}: {line.strip()!r} has no two paths; accepted: {ACCEPTED}")
    return PairLine(number, hq, lq, tags.strip())


def read_pairs(list_file: Path, scale: int) -> Catalogue:
    """Returns the pairs of a list; paths in it are relative to its folder.

    An LQ picture has the size of its HQ picture, or 1/scale of it. Raises DataError, with line numbers, for lines
    that cannot be read, missing pictures and pairs of other sizes. Damaged pictures are left out and named.
    """
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{list_file} is no UTF-8 text; accepted: lines of {ACCEPTED}") from error
    numbered = [(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"{list_file} has no lines; accepted: lines of {ACCEPTED}")

    def inspect(line: tuple[str, int]) -> Picture | Skipped | DataError:
        try:
            return _inspect(parse_line(*line), list_file.parent, scale)
        except DataError as error:
            return error

    found = in_threads(inspect, numbered)
    _raise_problems(list_file, [str(item) for item in found if isinstance(item, DataError)])
    pictures = [item for item in found if isinstance(item, Picture)]
    return Catalogue(
        tuple(sorted(pictures, key=lambda picture: picture.name)),
        tuple(item for item in found if isinstance(item, Skipped)),
    )


def _inspect(line: PairLine, folder: Path, scale: int) -> Picture | Skipped:
    sizes: list[tuple[int, int]] = []
    for written in (line.hq, line.lq):
        path = folder / written
        if not path.is_file():
            raise DataError(f"line {line.number}: there is no file {path}; accepted: {ACCEPTED}")
        try:
            sizes.append(read_size(str(path)))
        except PictureError as error:
            return Skipped(written, f"{error} (line {line.number})")
    _check_sizes(line.number, sizes[0], sizes[1], scale)
    hq, lq = (ByteRange(str(folder / written)) for written in (line.hq, line.lq))
    return Picture(line.hq, hq, sizes[0], lq, line.tags or None)


def _check_sizes(number: int, hq: tuple[int, int], lq: tuple[int, int], scale: int) -> None:
    if lq in (hq, (hq[0] / scale, hq[1] / scale)):
        return
    seen = f"HQ is {hq[1]}x{hq[0]} pixels and LQ {lq[1]}x{lq[0]}"
    if lq[0] > hq[0] or lq[1] > hq[1]:
        raise DataError(f"line {number}: {seen}: are they swapped? Each line is {ACCEPTED}")
    raise DataError(f"line {number}: {seen}; accepted: LQ of the size of HQ, or exactly 1/{scale} of it")


def _raise_problems(list_file: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = len(problems) - SHOWN_PROBLEMS
    shown = [*problems[:SHOWN_PROBLEMS], *([f"and {more} more lines"] if more > 0 else [])]
    raise DataError("\n  ".join([f"{list_file}: {len(problems)} of its lines cannot be used:", *shown]))


def _unquote(field: str) -> str:
    field = field.strip()
    return field[1:-1] if len(field) > 1 and field[0] == field[-1] and field[0] in "\"'" else field
