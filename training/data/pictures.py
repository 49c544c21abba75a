"""Photographs: finding them in a folder, and reading one as 8-bit RGB."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from training.data.storage import ByteRange, open_file, printable

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PROMPT_SUFFIX = ".txt"
SCAN_THREADS = 16  # headers are small reads, so the time is that of the disk or the network, not of the processor
TURNED_ORIENTATIONS = (5, 6, 7, 8)  # values of the EXIF orientation (EXIF 2.32, 4.6.4) that swap the sides
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow reads grey 16-bit PNG as one of these
LEVELS_PER_BYTE_LEVEL = 257  # 65535 / 255
BROKEN = (  # what Pillow raises for damaged files of the formats above
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class DataError(ValueError):
    """The training data cannot be used as they are."""


class PictureError(ValueError):
    """One picture cannot be read."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is left out of the training data, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A photograph for training."""

    name: str
    hq: ByteRange
    size: tuple[int, int]  # (height, width) of hq, upright
    lq: ByteRange | None = None  # its low-quality version, of the same size or smaller; None: to be made
    prompt: str | None = None  # None: the default prompt


@dataclass(frozen=True)
class Catalogue:
    """The photographs of a data set, sorted by name, and what was left out."""

    pictures: tuple[Picture, ...]
    skipped: tuple[Skipped, ...]


def decode(data: bytes) -> np.ndarray:
    """Returns a JPEG, PNG or WebP as RGB, uint8 (H, W, 3), upright.

    16-bit grey is scaled to 8 bits, and transparent pixels show white. Raises PictureError for a damaged picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except BROKEN as error:
        raise PictureError(describe_damage(error)) from error


def read_size(file: str | IO[bytes]) -> tuple[int, int]:
    """Returns (height, width) of a picture, upright, reading its header only; raises PictureError."""
    try:
        with open_file(file) if isinstance(file, str) else nullcontext(file) as opened, Image.open(opened) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            turned = exif.get(ExifTags.Base.Orientation) in TURNED_ORIENTATIONS
            return (image.width, image.height) if turned else (image.height, image.width)
    except BROKEN as error:
        raise PictureError(describe_damage(error)) from error


def read_prompt(data: bytes) -> str | None:
    """Returns the text of a prompt file, None if it is empty; raises PictureError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise PictureError(f"is no UTF-8 text ({error}); the default prompt is used") from error


def text_beside(picture: Path) -> Path | None:
    """Returns the text file of a picture's name, `.txt` or `.TXT`, None if there is none."""
    texts = (picture.with_suffix(suffix) for suffix in (PROMPT_SUFFIX, PROMPT_SUFFIX.upper()))
    return next((text for text in texts if text.is_file()), None)


def describe_damage(error: Exception) -> str:
    """Returns why a picture cannot be read, in words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no picture that can be read: damaged, empty or of another format"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be read ({str(error) or type(error).__name__})"


def scan_folder(folder: Path, sidecars: bool) -> Catalogue:
    """Returns the photographs in a folder and its subfolders, without decoding them.

    sidecars: whether `photo.txt` beside `photo.jpg` is its prompt. Raises DataError if there are none.
    """
    files = list(walk(folder))
    texts = {os.path.splitext(file)[0]: file for file in files if file.lower().endswith(PROMPT_SUFFIX)}

    def inspect(file: str) -> tuple[Picture | None, Skipped | None]:
        name = printable(Path(file).relative_to(folder).as_posix())
        text = texts.get(os.path.splitext(file)[0]) if sidecars else None
        prompt, problem = _read_sidecar(Path(text), folder) if text else (None, None)
        try:
            return Picture(name, ByteRange(file), read_size(file), prompt=prompt), problem
        except PictureError as error:
            return None, Skipped(name, str(error))

    pictures = [file for file in files if is_picture(file)]
    if not pictures:
        raise DataError(f"{folder} has no JPEG, PNG or WebP pictures, nor have its folders: {_describe_files(files)}")
    found = in_threads(inspect, pictures)
    return Catalogue(
        tuple(sorted((picture for picture, _ in found if picture), key=lambda picture: picture.name)),
        tuple(problem for _, problem in found if problem),
    )


def walk(folder: Path) -> Iterator[str]:
    """Yields the paths of all files in a folder and its subfolders, links included, each folder once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(parent, file) for file in sorted(files))


def is_picture(path: str) -> bool:
    """Returns whether the name is that of a picture."""
    return path.lower().endswith(PICTURE_SUFFIXES)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns the function's result for each item, in order."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return list(pool.map(function, items))


def _read_sidecar(path: Path, folder: Path) -> tuple[str | None, Skipped | None]:
    try:
        return read_prompt(ByteRange(str(path)).read()), None
    except OSError as error:
        return None, Skipped(path.relative_to(folder).as_posix(), describe_damage(error))
    except PictureError as error:
        return None, Skipped(path.relative_to(folder).as_posix(), str(error))


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in SIXTEEN_BIT_MODES:
        levels = np.asarray(image).astype(np.float32) / LEVELS_PER_BYTE_LEVEL
        return np.repeat(np.rint(levels.clip(0, 255)).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _describe_files(files: list[str]) -> str:
    if not files:
        return "they are empty"
    counts = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files)
    return "they hold " + ", ".join(f"{count} x {suffix}" for suffix, count in counts.most_common(3))
