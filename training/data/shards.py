"""Tar shards in the WebDataset layout, read at random places, and packing a folder into them.

A shard `*.tar` holds samples: `key.jpg` (or jpeg, png, webp) and, if there is a prompt, `key.txt`. An index of each
shard, made once and kept in a cache folder, tells where each picture lies, so that any sample can be read directly.

    python -m training.data.shards --data PHOTOGRAPHS --output SHARDS --per-shard 1000
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.data.pictures import (
    PICTURE_SUFFIXES,
    PROMPT_SUFFIX,
    Catalogue,
    DataError,
    Picture,
    PictureError,
    Skipped,
    read_prompt,
    read_size,
    scan_folder,
    walk,
)
from training.data.storage import ByteRange, open_file, printable, write_atomically

SHARD_SUFFIX = ".tar"
INDEX_FORMAT = 1  # raised when the index changes, so that old ones are made again
PER_SHARD = 1000  # pictures; at 1 MB each, shards of 1 GB


@dataclass(frozen=True)
class Member:
    """A picture in a shard."""

    key: str
    offset: int  # of its first byte in the shard
    size: int  # in bytes
    height: int
    width: int
    prompt: str | None


@dataclass(frozen=True)
class ShardIndex:
    """The pictures of a shard, and what was left out; `stamp` is the shard's size and time of change."""

    stamp: tuple[int, int]
    members: tuple[Member, ...]
    skipped: tuple[Skipped, ...]


def find_shards(data: Path) -> list[Path]:
    """Returns the shards in a folder and its subfolders, sorted, or the one shard that `data` is."""
    return (
        [data] if data.is_file() else sorted(Path(file) for file in walk(data) if file.lower().endswith(SHARD_SUFFIX))
    )


def read_shards(shards: Sequence[Path], cache: Path) -> Catalogue:
    """Returns the pictures of the shards. Broken shards and pictures are left out and named.

    cache: a folder for the indexes, created if missing. Raises DataError if no picture can be read.
    """
    pictures: list[Picture] = []
    skipped: list[Skipped] = []
    for shard in shards:
        index = read_index(shard, cache)
        skipped += index.skipped
        for member in index.members:
            place = ByteRange(str(shard), member.offset, member.size)
            name = printable(f"{shard.stem}/{member.key}")
            pictures.append(Picture(name, place, (member.height, member.width), prompt=member.prompt))
    if not pictures:
        reasons = "\n  ".join(["", *map(str, skipped[:5])])
        raise DataError(f"none of the {len(shards)} shards has a JPEG, PNG or WebP picture that can be read{reasons}")
    return Catalogue(tuple(sorted(pictures, key=lambda picture: picture.name)), tuple(skipped))


def read_index(shard: Path, cache: Path) -> ShardIndex:
    """Returns the index of a shard: the one in `cache` if the shard has not changed since, or a new one."""
    status = shard.stat()
    stamp = status.st_size, status.st_mtime_ns
    place = cache / "shards" / f"{hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:24]}.json"
    index = _load_index(place)
    if index is None or index.stamp != stamp:
        index = index_shard(shard, stamp)
        content = json.dumps({"format": INDEX_FORMAT, **asdict(index)})
        write_atomically(place, content.encode())
    return index


def index_shard(shard: Path, stamp: tuple[int, int]) -> ShardIndex:
    """Returns a new index of a shard; what can be read of a broken one is in it, and what cannot is named."""
    skipped: list[Skipped] = []
    files: dict[str, dict[str, tarfile.TarInfo]] = {}
    members: list[Member] = []
    end = 0
    try:
        with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for entry in tar:
                    key, suffix = _split_name(entry.name)
                    end = entry.offset_data + _padded(entry.size)
                    if entry.offset_data + entry.size > stamp[0]:
                        skipped.append(Skipped(f"{shard}/{entry.name}", "is cut off"))
                    elif entry.isreg() and suffix in (*PICTURE_SUFFIXES, PROMPT_SUFFIX):
                        files.setdefault(key, {})[suffix] = entry
                _check_end(shard, end)
            except (tarfile.TarError, OSError) as error:
                skipped.append(Skipped(str(shard), f"is broken after {end} bytes ({error}): what follows is left out"))
            for key, entries in files.items():
                members += _inspect(tar, shard, key, entries, skipped)
    except (tarfile.TarError, OSError) as error:
        skipped.append(Skipped(str(shard), f"is no uncompressed tar file that can be read ({error})"))
    return ShardIndex(stamp, tuple(members), tuple(skipped))


def pack(data: Path, output: Path, per_shard: int = PER_SHARD) -> tuple[list[Path], tuple[Skipped, ...]]:
    """Packs a folder of pictures with their prompts into shards; returns the shards and what was left out.

    The pictures keep their order, so that shards give the same samples as the folder. Raises DataError if `output`
    has shards already.
    """
    if per_shard < 1:
        raise DataError(f"pictures per shard are {per_shard}; accepted: 1 and more")
    if output.is_dir() and find_shards(output):
        raise DataError(f"{output} has shards already: choose another folder, or delete them")
    catalogue = scan_folder(data, sidecars=True)
    output.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    for first in range(0, len(catalogue.pictures), per_shard):
        shard = output / f"shard-{first // per_shard:06d}{SHARD_SUFFIX}"
        unfinished = shard.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w") as tar:
            for number, picture in enumerate(catalogue.pictures[first : first + per_shard], start=first):
                _add(tar, picture, number)
        unfinished.replace(shard)
        shards.append(shard)
    return shards, catalogue.skipped


def _inspect(
    tar: tarfile.TarFile, shard: Path, key: str, entries: dict[str, tarfile.TarInfo], skipped: list[Skipped]
) -> list[Member]:
    """Returns the member with its size and prompt, or nothing and a new entry in `skipped`."""
    pictures = [entry for suffix, entry in entries.items() if suffix != PROMPT_SUFFIX]
    text = entries.get(PROMPT_SUFFIX)
    prompt = None
    try:
        prompt = read_prompt(_open(tar, text).read()) if text else None
    except PictureError as error:
        skipped.append(Skipped(f"{shard}/{text.name if text else key}", str(error)))
    for extra in pictures[1:]:
        skipped.append(Skipped(f"{shard}/{extra.name}", f"is a second picture of the sample {key}"))
    for picture in pictures[:1]:
        try:
            height, width = read_size(_open(tar, picture))
            return [Member(key, picture.offset_data, picture.size, height, width, prompt)]
        except PictureError as error:
            skipped.append(Skipped(f"{shard}/{picture.name}", str(error)))
    return []


def _open(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> io.BufferedReader:
    file = tar.extractfile(entry)
    assert isinstance(file, io.BufferedReader), "only regular files are in the index"
    return file


def _split_name(name: str) -> tuple[str, str]:
    """Returns key and suffix: WebDataset splits at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _check_end(shard: Path, end: int) -> None:
    """Raises ReadError unless the mark of the end follows: Python's reader takes a damaged header for the end."""
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no mark of the archive's end")


def _load_index(place: Path) -> ShardIndex | None:
    """Returns a cached index, or None where there is none that can be read, which then is made again."""
    try:
        content = json.loads(place.read_bytes())
        if content["format"] != INDEX_FORMAT:
            return None
        members = tuple(Member(**member) for member in content["members"])
        skipped = tuple(Skipped(**item) for item in content["skipped"])
        return ShardIndex((content["stamp"][0], content["stamp"][1]), members, skipped)
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return None


def _add(tar: tarfile.TarFile, picture: Picture, number: int) -> None:
    path = Path(picture.hq.path)
    key = f"{number:08d}-{re.sub(r'[.]+', '_', printable(path.stem))}"
    contents = {f"{key}{path.suffix.lower()}": picture.hq.read()}
    if picture.prompt is not None:
        contents[f"{key}{PROMPT_SUFFIX}"] = picture.prompt.encode()
    for name, content in contents.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=PER_SHARD, help=f"pictures in a shard; {PER_SHARD}")
    arguments = parser.parse_args()
    try:
        shards, skipped = pack(arguments.data, arguments.output, arguments.per_shard)
    except DataError as error:
        parser.exit(1, f"{error}\n")
    for problem in skipped:
        print(f"left out: {problem}")
    print(f"{len(shards)} shards in {arguments.output}")


if __name__ == "__main__":
    main()
