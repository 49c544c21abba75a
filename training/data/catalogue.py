"""What a data set holds, whatever its format: a folder of pictures, a list of pairs, or tar shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from training.data.pairs import read_pairs
from training.data.pictures import Catalogue, DataError, Skipped, is_picture, scan_folder, walk
from training.data.shards import SHARD_SUFFIX, find_shards, read_shards

LIST_SUFFIX = ".txt"
DATA_FORMATS = ("auto", "folder", "pairs", "shards")
FORMAT_PLACES = {"folder": "folder of pictures", "pairs": "text file that lists them"}
PROMPT_MODES = ("auto", "fixed")


def read_catalogue(data: Path, data_format: str, scale: int, prompts: str, cache: Path) -> Catalogue:
    """Returns what `data` holds, of any size; arguments and errors as in `open_training_set`."""
    if data_format not in DATA_FORMATS:
        raise DataError(f"data_format is {data_format!r}; accepted: {', '.join(DATA_FORMATS)}")
    if prompts not in PROMPT_MODES:
        raise DataError(f"prompts is {prompts!r}; accepted: {', '.join(PROMPT_MODES)}")
    if not data.exists():
        raise DataError(f"{data}: there is no such file or folder")
    chosen = _tell_format(data) if data_format == "auto" else data_format
    if chosen in ("folder", "pairs") and data.is_file() != (chosen == "pairs"):
        kind = "file" if data.is_file() else "folder"
        raise DataError(f"{data} is a {kind}; accepted with data_format={chosen} is a {FORMAT_PLACES[chosen]}")
    if chosen == "folder":
        catalogue = scan_folder(data, sidecars=prompts == "auto")
    elif chosen == "pairs":
        catalogue = read_pairs(data, scale)
    else:
        catalogue = _read_shards(data, cache)
    if prompts == "fixed":
        return replace(catalogue, pictures=tuple(replace(picture, prompt=None) for picture in catalogue.pictures))
    return catalogue


def _tell_format(data: Path) -> str:
    if data.is_file():
        formats = {LIST_SUFFIX: "pairs", SHARD_SUFFIX: "shards"}
        if data.suffix.lower() in formats:
            return formats[data.suffix.lower()]
        raise DataError(
            f"{data} is a {data.suffix or 'nameless'} file; accepted: a folder, a .txt list or a .tar shard"
        )
    files = list(walk(data))
    shards = sum(file.lower().endswith(SHARD_SUFFIX) for file in files)
    pictures = sum(map(is_picture, files))
    if shards and pictures:
        raise DataError(
            f"{data} has {shards} .tar files and {pictures} pictures: say which with data_format=shards or folder"
        )
    return "shards" if shards else "folder"


def _read_shards(data: Path, cache: Path) -> Catalogue:
    shards = find_shards(data)
    if not shards:
        raise DataError(f"{data} has no {SHARD_SUFFIX} files, nor have its folders")
    return read_shards(shards, cache)


def without_small(data: Path, catalogue: Catalogue, crop: int) -> Catalogue:
    """Returns the catalogue without pictures smaller than the crop; raises DataError if none is left."""
    large = tuple(picture for picture in catalogue.pictures if min(picture.size) >= crop)
    small = [picture for picture in catalogue.pictures if min(picture.size) < crop]
    if not large:
        if not small:
            reasons = "\n  ".join(["", *map(str, catalogue.skipped[:5])])
            raise DataError(f"{data} has no picture that can be read{reasons}")
        height, width = max((picture.size for picture in small), key=lambda size: (min(size), max(size)))
        raise DataError(
            f"{data}: all {len(small)} pictures are smaller than the crop of {crop}x{crop}; the largest is "
            f"{width}x{height}. Choose a smaller crop or larger pictures"
        )
    reasons = [
        Skipped(picture.name, f"is {picture.size[1]}x{picture.size[0]} pixels, smaller than the crop of {crop}")
        for picture in small
    ]
    return Catalogue(large, (*catalogue.skipped, *reasons))
