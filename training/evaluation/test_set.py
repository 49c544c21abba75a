"""The pictures of a test set: low-quality ones, with their truths where there are any.

Accepted:
- a folder with a low-quality sub-folder (test_LR, LR, LQ, low or input) and a high-quality one (test_HR, HR, HQ, GT,
  high or target), in any case: RealSR and DRealSR crops of StableSR have test_LR and test_HR, DIV2K-Val lq and gt;
- a folder whose files end in _LR4 (_LR2, ...) and _HR, as RealSR is distributed;
- a folder of low-quality pictures only, such as RealLR200;
- a text file with a line `HQ LQ tags` for each pair, as training reads it (`training.data.pairs`).

A picture's tags are those of its line, or the text file of its name beside it, or beside its truth.

Files belong together when their stems are equal, or equal without endings such as x4, _x1, _LR4, _HR, _GT.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from training.data.pairs import parse_line
from training.data.pictures import (
    PICTURE_SUFFIXES,
    DataError,
    PictureError,
    decode,
    describe_damage,
    is_picture,
    read_prompt,
    read_size,
    text_beside,
)
from training.data.storage import ByteRange
from training.images import to_tensor

LQ_FOLDERS = ("test_lr", "lr", "lq", "low", "input")
HQ_FOLDERS = ("test_hr", "hr", "hq", "gt", "high", "target")
ENDING = re.compile(r"(?:[_-]?x\d|[_-](?:lr|hr|lq|hq|gt|sr)\d?)+$", re.IGNORECASE)
LQ_ENDING, HQ_ENDING = re.compile(r"_l[rq]\d?$", re.IGNORECASE), re.compile(r"_(?:h[rq]|gt)$", re.IGNORECASE)
SHOWN = 5  # names in an error message


class EvaluationError(ValueError):
    """The test set, or another method's pictures, are not what can be evaluated."""


@dataclass(frozen=True)
class TestPicture:
    """One picture to restore."""

    name: str  # the stem of the low-quality file without endings: what other methods' pictures are matched by
    lq: Path
    hq: Path | None  # None: only measures without a reference
    tags: str | None = None  # its prompt, as the test set has it

    __test__ = False  # not a test class, whatever pytest thinks of the name


def find_pictures(data: Path) -> list[TestPicture]:
    """Returns the test pictures at `data` (see the module), by name. Raises EvaluationError."""
    if data.is_file():
        return _from_list(data)
    if not data.is_dir():
        raise EvaluationError(f"{data}: there is no such folder or file")
    lq_folder, hq_folder = _folder(data, LQ_FOLDERS), _folder(data, HQ_FOLDERS)
    if lq_folder and hq_folder:
        return _with_texts(_paired(_pictures_in(lq_folder), _pictures_in(hq_folder)))
    if hq_folder:
        raise EvaluationError(f"{data} has {hq_folder.name}/ but no low-quality folder: {', '.join(LQ_FOLDERS)}")
    pictures = _pictures_in(lq_folder or data)
    lq = [path for path in pictures if LQ_ENDING.search(path.stem)]
    hq = [path for path in pictures if HQ_ENDING.search(path.stem)]
    if lq and hq:
        return _with_texts(_paired(lq, hq))
    return _with_texts(_unique([TestPicture(short_stem(path), path, None) for path in pictures], data))


def short_stem(path: Path) -> str:
    """Returns the file's stem without endings that say which side of a pair it is: 0801x4.png -> 0801."""
    return ENDING.sub("", path.stem) or path.stem


def match(wanted: Sequence[Path], candidates: Iterable[Path], what: str) -> list[Path]:
    """Returns, for each wanted file, the candidate of its stem, else the only one of its short stem.

    Raises EvaluationError, naming the files, where there is none or more than one. what: the candidates, in words.
    """
    exact: dict[str, Path] = {}
    short: defaultdict[str, list[Path]] = defaultdict(list)
    for path in candidates:
        if path.stem in exact:
            raise EvaluationError(f"{what}: {exact[path.stem]} and {path.name} have one stem; accepted: one file each")
        exact[path.stem] = path
        short[short_stem(path)].append(path)
    found = {path: [exact[path.stem]] if path.stem in exact else short[short_stem(path)] for path in wanted}
    missing = [path.name for path, paths in found.items() if not paths]
    if missing:
        raise EvaluationError(f"{what}: nothing for {_listed(missing)}; files are matched by their stems")
    for path, paths in found.items():
        if len(paths) > 1:
            raise EvaluationError(f"{what}: {_listed([p.name for p in paths])} all match {path.name}")
    return [found[path][0] for path in wanted]


def other_method(folder: Path, pictures: Sequence[TestPicture]) -> dict[str, Path]:
    """Returns another method's picture for each test picture, by name. Raises EvaluationError as `match`."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: there is no such folder")
    paths = match([picture.lq for picture in pictures], _pictures_in(folder), f"{folder}")
    return {picture.name: path for picture, path in zip(pictures, paths, strict=True)}


def check_sizes(pictures: Iterable[TestPicture], scale: int) -> None:
    """Raises EvaluationError unless each truth has `scale` times the sides of its picture, or the same sides."""
    for picture in pictures:
        height, width = _size(picture.lq)
        if picture.hq is None:
            continue
        truth = _size(picture.hq)
        if truth not in ((height * scale, width * scale), (height, width)):
            raise EvaluationError(
                f"{picture.hq} is {truth[1]}x{truth[0]} pixels, {picture.lq} {width}x{height}; accepted: "
                f"{width * scale}x{height * scale} (x{scale}), or equal sides (already enlarged)"
            )


def read_picture(path: Path) -> Tensor:
    """Returns the picture as (1, 3, H, W) float32 in [0, 1]. Raises EvaluationError for a broken file."""
    try:
        pixels = decode(ByteRange(str(path)).read())
    except OSError as error:
        raise EvaluationError(f"{path} {describe_damage(error)}") from error
    except PictureError as error:
        raise EvaluationError(f"{path} {error}") from error
    return to_tensor(pixels)


def _size(path: Path) -> tuple[int, int]:
    try:
        return read_size(str(path))
    except PictureError as error:
        raise EvaluationError(f"{path} {error}") from error


def _from_list(path: Path) -> list[TestPicture]:
    pictures = []
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = parse_line(text, number)
        except DataError as error:
            raise EvaluationError(f"{path}: {error}") from error
        hq, lq = path.parent / line.hq, path.parent / line.lq
        for file in (hq, lq):
            if not file.is_file():
                raise EvaluationError(f"{path}: line {number}: there is no file {file}")
        pictures.append(TestPicture(short_stem(lq), lq, hq, line.tags or None))
    return _unique(pictures, path)


def _paired(lq: list[Path], hq: list[Path]) -> list[TestPicture]:
    truths = match(lq, hq, f"high-quality pictures in {hq[0].parent}")
    match(hq, lq, f"low-quality pictures in {lq[0].parent}")  # a truth without a picture is a mistake too
    pictures = [TestPicture(short_stem(path), path, truth) for path, truth in zip(lq, truths, strict=True)]
    return _unique(pictures, lq[0].parent)


def _unique(pictures: list[TestPicture], where: Path) -> list[TestPicture]:
    if not pictures:
        raise EvaluationError(f"{where} names no pictures")
    names = [picture.name for picture in pictures]
    if len(set(names)) < len(names):  # then the endings are part of the names
        pictures = [replace(picture, name=picture.lq.stem) for picture in pictures]
        names = [picture.name for picture in pictures]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise EvaluationError(f"{where}: {_listed(repeated)} come more than once; accepted: one picture a stem")
    return sorted(pictures, key=lambda picture: picture.name)


def _with_texts(pictures: list[TestPicture]) -> list[TestPicture]:
    return [replace(picture, tags=_text_beside(picture.lq) or _text_beside(picture.hq)) for picture in pictures]


def _text_beside(path: Path | None) -> str | None:
    """Returns the text in the file beside a picture, None where there is none. Raises EvaluationError."""
    text = None if path is None else text_beside(path)
    if text is None:
        return None
    try:
        return read_prompt(text.read_bytes())
    except (OSError, PictureError) as error:
        raise EvaluationError(f"{text} cannot be read: {error}") from error


def _folder(data: Path, names: Sequence[str]) -> Path | None:
    found = sorted(path for path in data.iterdir() if path.is_dir() and path.name.lower() in names)
    if len(found) > 1:
        raise EvaluationError(f"{data} has {_listed([path.name for path in found])}; accepted: one of them")
    return found[0] if found else None


def _pictures_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if is_picture(path.name))
    if not found:
        raise EvaluationError(f"{folder} has no pictures; accepted: {', '.join(PICTURE_SUFFIXES)}")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
