"""What a picture's file holds, read, and written again with a result."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from host import png
from host.pictures import EXIF_IFD, ORIENTATION, Picture, PictureError, open_picture, read_picture, uploads
from host.results import KINDS, Finish, _deep_png, finished

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PIXEL_X, MAKE = 0xA002, 0x010F


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: int = 1) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION], data[MAKE] = orientation, "Maker"
    data.get_ifd(EXIF_IFD)[PIXEL_X] = 40
    return data


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_read_and_sent_in_full(channels: int, kind: str) -> None:
    values = noise(9, 13, channels, dtype=np.uint16)
    if kind == "PNG":
        content = _deep_png(values)
    elif channels == 1:
        content = saved(Image.fromarray(values[..., 0]), "TIFF")
    else:
        content = tiff_of_16_bits(values)
    picture = read_picture(content)
    assert picture.deep and np.array_equal(picture.pixels, values)
    high, low = (np.asarray(Image.open(io.BytesIO(part))).astype(np.uint32) for part in uploads(picture))
    assert np.array_equal((high * 256 + low)[..., :channels], values)


def tiff_of_16_bits(values: np.ndarray) -> bytes:
    """Returns a TIFF of (H, W, C) as scanners write it (TIFF 6.0, section 6), which Pillow cannot write."""
    import struct

    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    bits_at = 8 + len(data)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits_at), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]
    entries += [(338, 3, 1, 2)] if channels == 4 else []
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    bits = struct.pack(f"<{channels}H", *[16] * channels)
    return b"II*\0" + struct.pack("<I", bits_at + len(bits)) + data + bits + table


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int, deep: bool) -> None:
    values = noise(5, 8, 3)
    plain = saved(Image.fromarray(values), "PNG", exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(plain))))
    if deep:
        whole = _deep_png(values.astype(np.uint16) * 257)
        plain = png.with_metadata(whole, [(b"eXIf", exif(orientation).tobytes().removeprefix(b"Exif\0\0"))])
    picture = read_picture(plain)
    assert np.array_equal(picture.pixels, upright.astype(np.uint16) * 257 if deep else upright)
    kept = Image.Exif()
    kept.load(picture.exif or b"")
    assert kept[ORIENTATION] == 1 and kept[MAKE] == "Maker"


def test_palettes_masks_and_floats_are_read_for_what_they_show() -> None:
    clear = Image.fromarray(noise(6, 6, 3)).quantize(8)
    clear.info["transparency"] = 3
    picture = read_picture(saved(clear, "PNG"))
    assert picture.has_alpha and {0, 255} >= set(picture.pixels[..., 3].flat)
    assert read_picture(saved(Image.fromarray(noise(6, 6, 3)).convert("1"), "PNG")).pixels.shape == (6, 6, 1)
    halves = read_picture(saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"))
    assert halves.deep and set(halves.pixels.flat) == {32768}
    cmyk = read_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", icc_profile=b""))
    assert np.abs(cmyk.pixels.astype(int) - (254, 0, 0)).max() < 8 and "sRGB" in cmyk.notes[0]


def test_a_phone_s_second_picture_and_a_scan_s_thumbnail_are_no_second_page() -> None:
    page, small = Image.fromarray(noise(32, 32, 3)), Image.fromarray(noise(8, 8, 3))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    assert read_picture(saved(page, "TIFF", save_all=True, append_images=[small])).size == (32, 32)
    assert read_picture(saved(page, "MPO", save_all=True, append_images=[small])).size == (32, 32)


def bad_files() -> dict[str, tuple[bytes, str]]:
    page = Image.fromarray(noise(32, 32, 3))
    large = png.SIGNATURE + png.chunk(b"IHDR", bytes.fromhex("0000ffff0000ffff0802000000"))
    return {
        "empty": (b"", r"is empty \(0 bytes\)"),
        "text": (b"hello " * 9, "is not a picture that can be read"),
        "truncated jpeg": (saved(page, "JPEG")[:400], "is damaged"),
        "truncated png": (saved(page, "PNG")[:900], "is damaged"),
        "flipped": (saved(page, "PNG")[:60] + bytes(40) + saved(page, "PNG")[100:], "is damaged"),
        "gif": (saved(page, "GIF", save_all=True, append_images=[page.rotate(90)]), "has 2 frames.*ffmpeg"),
        "pages": (saved(page, "TIFF", save_all=True, append_images=[page]), "has 2 pages"),
        "bomb": (large + png.chunk(b"IDAT", b"") + png.chunk(b"IEND", b""), "is too large"),
        "floats": (saved(Image.fromarray(np.full((4, 4), 7.0, np.float32)), "TIFF"), "numbers of 7 to 7; accepted"),
        "NaN": (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "NaN"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_what_is_no_still_picture_is_refused_in_one_sentence(name: str) -> None:
    content, message = bad_files()[name]
    with pytest.raises(PictureError, match=message) as caught:
        read_picture(content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no.png cannot be read: No such file"):
        open_picture(tmp_path / "no.png")


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("shape", [(8, 10, 1), (8, 10, 2), (8, 10, 3), (8, 10, 4)])
def test_a_result_keeps_what_its_format_can(suffix: str, shape: tuple[int, ...]) -> None:
    alpha = shape[2] in (2, 4)
    grey_profile = SRGB if shape[2] > 2 else None  # Pillow makes no grey profile
    source = Picture(np.full(shape, 90, np.uint8), exif(1).tobytes(), grey_profile)
    answer = np.full((16, 20, 4 if alpha else 3), 100, np.uint8)
    content = finished(saved(Image.fromarray(answer), "PNG"), source, Finish(suffix))
    result, kind = read_picture(content), KINDS[suffix]
    assert result.size == (20, 16) and result.has_alpha == (alpha and kind.alpha)
    assert np.abs(result.pixels[..., 0].astype(int) - (100 if not alpha or kind.alpha else 194)).max() <= 2
    if kind.name == "BMP":
        return
    assert result.profile == grey_profile
    kept = Image.Exif()
    kept.load(result.exif or b"")
    assert kept[MAKE] == "Maker" and kept.get_ifd(EXIF_IFD)[PIXEL_X] == 20


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_come_back_with_16(channels: int) -> None:
    source = Picture(noise(8, 10, channels, dtype=np.uint16))
    answer = noise(16, 20, 4 if channels in (2, 4) else 3, dtype=np.uint16)
    if channels <= 2:
        answer[..., :3] = answer[..., :1]
    result = read_picture(finished(_deep_png(answer), source, Finish(".png")))
    wanted = answer[..., [0, 3][:channels] if channels <= 2 else slice(channels)]
    # Grey with alpha is written as RGBA: PyAV writes no other PNG of 16 bits.
    assert result.deep and np.array_equal(result.pixels[..., [0, 3]] if channels == 2 else result.pixels, wanted)


def test_alpha_that_a_workflow_lost_is_put_back() -> None:
    pixels = noise(8, 10, 4)
    pixels[..., 3] = 200
    result = read_picture(finished(saved(Image.fromarray(noise(16, 20, 3)), "PNG"), Picture(pixels), Finish()))
    assert result.has_alpha and set(result.pixels[..., 3].flat) == {200}


def test_a_result_too_large_for_its_format_is_refused() -> None:
    wide = saved(Image.new("RGB", (16384, 1)), "PNG")
    with pytest.raises(RuntimeError, match="is 16384x1; WebP holds at most 16383"):
        finished(wide, Picture(noise(1, 4096, 3)), Finish(".webp"))


def test_an_answer_that_was_cut_off_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not a whole PNG"):
        finished(saved(Image.new("RGB", (40, 40)), "PNG")[:-20], Picture(noise(10, 10, 3)), Finish())
