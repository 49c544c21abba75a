"""Batches of pictures through a real ComfyUI: results, resuming, and bad pictures."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_pictures import pictures, records
from PIL import Image, ImageCms
from test_pictures import tiff_of_16_bits

from host.batch import BatchOptions, upscale_folder
from host.results import _deep_png
from host.server import ComfyServer

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION = 0x010F, 0x0112
Invert = Callable[..., BatchOptions]


# --- results


def test_a_tree_of_many_formats_is_upscaled_and_keeps_what_files_hold(
    comfy_server: ComfyServer, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "deep er").mkdir(parents=True)
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "Maker", 6
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    photo = Image.fromarray(noise[..., :3])
    photo.save(source / "turned.jpg", exif=exif, icc_profile=SRGB)
    photo.convert("L").save(source / "grey.bmp")
    photo.convert("P").save(source / "palette.gif")
    photo.convert("CMYK").save(source / "deep er" / "print.tif")
    Image.fromarray(noise).save(source / "deep er" / "glass.webp", lossless=True)
    (source / "deep er" / "deep.png").write_bytes(_deep_png(noise[..., :3].astype(np.uint16) * 256 + 77))
    (source / "scan.tiff").write_bytes(tiff_of_16_bits(noise[..., :3].astype(np.uint16) * 257))
    options = BatchOptions(servers=[comfy_server.url], assignments=["TADSRUpscale.scale=2"])
    before = server_files(comfy_server)
    report = upscale_folder([source], output, options)
    assert (report.done, report.failures) == (7, [])
    turned, glass = Image.open(output / "turned.png"), Image.open(output / "deep er" / "glass.png")
    assert turned.size == (24, 40) and turned.info["icc_profile"] == SRGB
    assert turned.getexif()[MAKE] == "Maker" and turned.getexif()[ORIENTATION] == 1
    assert json.loads(turned.info["prompt"])["3"]["inputs"]["scale"] == 2
    assert glass.mode == "RGBA" and Image.open(output / "grey.png").mode == "L"
    for name in ("deep er/deep.png", "scan.png"):
        assert (output / name).read_bytes()[24] == 16, "16 bits a sample stand in the header"
    assert [note for record in records(output) for note in record["notes"]] == ["CMYK was converted to sRGB"]
    assert server_files(comfy_server) == before, "the server's folders are as they were"


def server_files(server: ComfyServer) -> set[str]:
    folders = [server.base / name for name in ("input", "output", "temp")]
    return {str(file) for folder in folders for file in folder.rglob("*") if file.is_file() and file.stat().st_size}


@pytest.mark.parametrize(("kind", "mode"), [("jpg", "RGB"), ("webp", "RGBA")])
def test_the_format_is_chosen_and_holds_what_it_can(invert: Invert, tmp_path: Path, kind: str, mode: str) -> None:
    Image.new("RGBA", (8, 6), (255, 155, 55, 128)).save(tmp_path / "a.png", icc_profile=SRGB)
    report = upscale_folder([tmp_path / "a.png"], tmp_path / "out", invert(format=kind, quality=90))
    made = Image.open(tmp_path / "out" / f"a.{kind}")
    assert report.done == 1 and made.mode == mode and made.info["icc_profile"] == SRGB


def test_a_window_of_frames_has_one_colour(invert: Invert, tmp_path: Path) -> None:
    for number, level in enumerate((100, 130, 100, 130)):
        Image.new("RGB", (8, 6), (level,) * 3).save(tmp_path / f"f{number}.png")
    upscale_folder([tmp_path], tmp_path / "out", invert(window=3))
    levels = [Image.open(tmp_path / "out" / f"f{number}.png").getpixel((0, 0)) for number in range(4)]
    assert levels == [(115,) * 3, (110,) * 3, (120,) * 3, (115,) * 3], "the mean of up to three frames around each"


# --- resuming


def test_the_same_command_again_does_only_what_is_missing(invert: Invert, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    paths = pictures(source, 5)

    def again(**changes: Any) -> tuple[int, int]:
        report = upscale_folder([source], output, invert(**changes))
        assert not report.failures
        return report.done, report.there

    assert again() == (5, 0)
    assert again() == (0, 5)
    (output / "p001.png").unlink()
    (output / "p002.png").write_bytes(b"damaged")
    Image.new("RGB", (8, 6), "white").save(paths[3])
    assert again() == (3, 2)
    assert Image.open(output / "p003.png").convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert again(in_flight=1) == (0, 5), "a setting that changes no result"
    assert again(assignments=["7.image=y.png"]) == (0, 5), "the picture's own input is ours"
    assert again(window=3) == (5, 0)
    assert again(window=3, force=True) == (5, 0)
    assert len(records(output)) == 18


def test_a_stranger_s_file_is_not_written_over(invert: Invert, tmp_path: Path) -> None:
    pictures(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p000.png").write_text("precious")
    report = upscale_folder([tmp_path / "in"], tmp_path / "out", invert())
    assert report.done == 1 and "in its way that no batch made" in report.failures[0].reason
    assert (tmp_path / "out" / "p000.png").read_text() == "precious"
    assert upscale_folder([tmp_path / "in"], tmp_path / "out", invert(force=True)).done == 2


# --- pictures


def test_bad_pictures_are_one_sentence_each_and_the_rest_is_done(invert: Invert, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (good,) = pictures(source, 1)
    content = good.read_bytes()
    (source / "cut.png").write_bytes(content[:50])
    (source / "empty.png").touch()
    (source / "text.jpg").write_text("not a picture")
    frames = [Image.new("L", (8, 6), level) for level in (0, 255)]
    frames[0].save(source / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (20000, 20000)).save(source / "bomb.png")
    (source / "film.mov").touch()
    (source / "folder.png").mkdir()
    report = upscale_folder([source], tmp_path / "out", invert())
    reasons = {failure.name: failure.reason for failure in report.failures}
    assert report.done == 1 and len(records(tmp_path / "out")) == 1
    for name, words in {
        "cut.png": "is damaged",
        "empty.png": "is empty (0 bytes)",
        "text.jpg": "is not a picture that can be read",
        "moves.gif": "has 2 frames; accepted is a still picture",
        "bomb.png": "is too large",
        "film.mov": "is a video: split it (ffmpeg",
    }.items():
        assert words in reasons.pop(name)
    assert not reasons


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as a name")
def test_any_name_is_carried(invert: Invert, tmp_path: Path) -> None:
    source = os.fsencode(tmp_path / "in")
    os.mkdir(source)
    names = [b"two  spaces .png", b"quo'te\".png", b"new\nline.png", b"\xff\xfe.png", b"%41;$HOME&.png", b"-o.png"]
    names += [("ä" * 125 + "a").encode() + b".png"]
    content = io.BytesIO()
    Image.new("RGB", (8, 6)).save(content, "PNG")
    for name in names:
        with open(os.path.join(source, name), "wb") as file:
            file.write(content.getvalue())
    report = upscale_folder([tmp_path / "in"], tmp_path / "out", invert())
    assert report.done == len(names) and not report.failures
    found = {name for name in os.listdir(os.fsencode(tmp_path / "out")) if name.endswith(b".png")}
    assert found == set(names)
    assert upscale_folder([tmp_path / "in"], tmp_path / "out", invert()).there == len(names)
