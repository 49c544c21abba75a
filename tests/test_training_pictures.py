"""Reading pictures of all kinds, and lists of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from training_pictures import CROP, open_set, save_picture

from tadsr.geometry import enlarge
from training.data import DataError
from training.data.pairs import parse_line
from training.data.pictures import PictureError, decode, read_size


def ramp(height: int = 6, width: int = 9) -> np.ndarray:
    return np.linspace(0, 255, height * width).round().astype(np.uint8).reshape(height, width)


def saved(image: Image.Image, path: Path, **options: Any) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


# Decoding


def test_grey_palette_and_16_bit_pictures_become_rgb(tmp_path: Path) -> None:
    gray = ramp()
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    assert np.array_equal(decode(saved(Image.fromarray(gray), tmp_path / "l.png")), expected)
    assert np.array_equal(decode(saved(Image.fromarray(gray).convert("P"), tmp_path / "p.png")), expected)
    deep = gray.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "gray16.png"), deep)
    assert np.array_equal(decode((tmp_path / "gray16.png").read_bytes()), expected)
    colours = np.stack([deep, deep[::-1], deep.max() - deep], axis=2)
    cv2.imwrite(str(tmp_path / "rgb16.png"), colours[:, :, ::-1])
    assert np.array_equal(decode((tmp_path / "rgb16.png").read_bytes()), (colours // 257).astype(np.uint8))
    assert np.array_equal(decode(saved(Image.fromarray(gray > 99), tmp_path / "1.png")), (expected > 99) * 255)


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    picture = np.zeros((2, 2, 4), np.uint8)
    picture[..., 0] = 200
    picture[0, 0, 3], picture[1, 1, 3] = 255, 128
    decoded = decode(saved(Image.fromarray(picture), tmp_path / "a.png"))
    assert decoded[0, 0].tolist() == [200, 0, 0] and decoded[0, 1].tolist() == [255, 255, 255]
    assert np.allclose(decoded[1, 1], [227, 127, 127], atol=1)
    coloured = Image.fromarray(picture[..., :3])
    assert decode(saved(coloured, tmp_path / "key.png", transparency=(200, 0, 0))).min() == 255


def test_cmyk_pictures_become_rgb(tmp_path: Path) -> None:
    colours = np.full((16, 16, 3), (220, 40, 60), np.uint8)
    decoded = decode(saved(Image.fromarray(colours).convert("CMYK"), tmp_path / "a.jpg", quality=100))
    assert np.abs(decoded.astype(int) - colours).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255  # a white corner at the top left
    turned = {
        **{1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]},
        **{5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 8: np.rot90(upright, -1)},
        7: upright[::-1, ::-1].transpose(1, 0, 2),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    decoded = decode(saved(Image.fromarray(np.ascontiguousarray(turned[orientation])), path, exif=exif, quality=100))
    assert decoded.shape == (32, 48, 3) and np.abs(decoded.astype(int) - upright).mean() < 3
    assert read_size(str(path)) == (32, 48)


def test_damaged_pictures_say_so(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "webp"):
        save_picture(tmp_path / f"a.{suffix}", 200, 300)
        data = (tmp_path / f"a.{suffix}").read_bytes()
        for cut in (0, 5, 20, len(data) // 2, len(data) - 30):
            with pytest.raises(PictureError, match="read"):
                decode(data[:cut])
    for seed in range(60):  # bits flipped in the middle: either a picture, or this error
        rng = np.random.default_rng(seed)
        damaged = bytearray((tmp_path / "a.png").read_bytes())
        for place in rng.integers(8, len(damaged), 8):
            damaged[place] ^= 1 << int(rng.integers(8))
        try:
            assert decode(bytes(damaged)).ndim == 3
        except PictureError:
            continue


# Lists of pairs


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hq/a.png lq/a.png", ("hq/a.png", "lq/a.png", "")),
        ("hq/a.png  lq/a.png a street, two houses, sky", ("hq/a.png", "lq/a.png", "a street, two houses, sky")),
        ("hq/a b.png\tlq/a b.png\ta street, sky", ("hq/a b.png", "lq/a b.png", "a street, sky")),
        ("hq/a b.png\tlq/a b.png", ("hq/a b.png", "lq/a b.png", "")),
        ("\"hq/a b.png\" 'lq/a b.png' a dog's life", ("hq/a b.png", "lq/a b.png", "a dog's life")),
        ('"hq/a b.png"\t"lq/a b.png"\tsky', ("hq/a b.png", "lq/a b.png", "sky")),
        ('"hq/a b.png" lq/a.png "quoted", sky', ("hq/a b.png", "lq/a.png", '"quoted", sky')),
    ],
)
def test_lines_of_a_list(line: str, expected: tuple[str, str, str]) -> None:
    parsed = parse_line(line, 7)
    assert (parsed.number, parsed.hq, parsed.lq, parsed.tags) == (7, *expected)


@pytest.mark.parametrize("line", ["hq/a.png", '"hq/a b.png"', "hq/a.png\t", '"hq/a.png lq/a.png'])
def test_lines_without_two_paths(line: str) -> None:
    with pytest.raises(DataError, match="line 7: .* has no two paths"):
        parse_line(line, 7)


def write_pair(folder: Path, name: str, scale: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HQ 48x56 whose pixels tell their place; LQ of 1/scale with the same marks, so that misalignment shows."""
    height, width = 48 // scale, 56 // scale
    rows, columns = np.mgrid[:height, :width]
    lq = np.stack([rows * 5, columns * 4, np.full((height, width), seed)], axis=2).astype(np.uint8)
    hq = lq.repeat(scale, axis=0).repeat(scale, axis=1)
    for kind, image in (("hq", hq), ("lq", lq)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / kind / name)
    return hq, lq


@pytest.mark.parametrize("scale", [1, 4])
def test_pairs_are_cropped_alike(scale: int, tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path / "pictures", f"{number} x.png", scale, number)
    lines = [f"pictures/hq/{i} x.png\tpictures/lq/{i} x.png\tpicture {i}, tags" for i in range(3)]
    (tmp_path / "list.txt").write_text("\n\n".join(lines) + "\n")
    data = open_set(tmp_path / "list.txt", tmp_path, held_out=0, plain_bicubic_share=0.0)
    assert data.texts == [f"picture {i}, tags" for i in range(3)]
    seen = set()
    for index in range(30):
        sample = data[index]
        hq, lq = (((image + 1) * 127.5).round() for image in (sample.hq, sample.lq))
        number = int(hq[2, 0, 0])
        assert (sample.name, sample.prompt) == (f"pictures/hq/{number} x.png", f"picture {number}, tags")
        if scale == 1:
            assert torch.equal(hq, lq)
        else:
            expected = enlarge(hq[None, :, ::4, ::4] / 255, (CROP, CROP))[0] * 2 - 1
            assert torch.allclose(sample.lq, expected, atol=1e-6), "LQ was cropped elsewhere than HQ"
        seen.add((int(hq[0].min()), int(hq[1].min()), bool(hq[1, 0, 0] > hq[1, 0, -1])))
    assert len(seen) > 10, "crops and flips do not vary"
    validation = open_set(tmp_path / "list.txt", tmp_path, held_out=1).validation[0]
    assert validation.prompt == "picture 2, tags"


def test_plain_bicubic_replaces_a_listed_lq(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png", 4, 200)
    Image.new("RGB", (14, 12)).save(tmp_path / "black.png")
    (tmp_path / "list.txt").write_text("hq/a.png black.png")
    for share, level in ((0.0, 0), (1.0, 200)):
        data = open_set(tmp_path / "list.txt", tmp_path, held_out=0, plain_bicubic_share=share)
        assert ((data[0].lq[2] + 1) * 127.5).round().unique().tolist() == [level]


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png", 4, 0)
    save_picture(tmp_path / "odd.png", 20, 30)
    listing = tmp_path / "list.txt"
    good = "hq/a.png lq/a.png tags\n"
    for bad, message in [
        ("\nhq/none.png lq/a.png tags", r"1 of its lines.*\n.*line 3: there is no file .*none\.png"),
        ("lq/a.png hq/a.png tags", "line 2: HQ is 14x12 pixels and LQ 56x48: are they swapped"),
        ("hq/a.png odd.png tags", "line 2: HQ is 56x48 pixels and LQ 30x20; accepted: .* 1/4"),
        ("hq/a.png", "line 2: .* has no two paths"),
        ("\n".join(["hq/a.png lq/none.png"] * 9), "9 of its lines cannot be used(.|\n)*line 6(.|\n)*and 4 more lines"),
    ]:
        listing.write_text(good + bad)
        with pytest.raises(DataError, match=message):
            open_set(listing, tmp_path)
    listing.write_text("\n")
    with pytest.raises(DataError, match="has no lines"):
        open_set(listing, tmp_path)


def test_damaged_pictures_of_a_list_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png", 4, 0)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text("hq/a.png lq/a.png\nhq/a.png bad.png\n")
    data = open_set(tmp_path / "list.txt", tmp_path, held_out=0)
    assert data.names == ["hq/a.png"] and "bad.png" in str(data.skipped[0]) and "line 2" in str(data.skipped[0])


def test_no_version_of_a_held_out_photograph_is_trained_on(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png", 4, 0)
    write_pair(tmp_path, "b.png", 4, 1)
    (tmp_path / "list.txt").write_text("hq/a.png lq/a.png\nhq/b.png lq/a.png\nhq/b.png lq/b.png\n")
    data = open_set(tmp_path / "list.txt", tmp_path, held_out=1)
    assert data.validation.names == ["hq/b.png"] and data.names == ["hq/a.png"]
