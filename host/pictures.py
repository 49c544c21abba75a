"""Reads a picture with all that its file holds, and writes a result that keeps it: quickstart.py and batch.py.

ComfyUI gets a plain, upright picture; alpha travels beside it, EXIF and colour profile stay here and are put back.
Needs numpy, Pillow and, for 16 bits, PyAV, which ComfyUI brings.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageSequence

from .errors import HostError

ORIENTATION, EXIF_IFD = 0x0112, 0x8769  # EXIF 2.32, tables 4 and 8
_NEW_SUBFILE_TYPE, _REDUCED = 254, 1  # TIFF 6.0: a page that is a smaller copy of another
# TIFF 6.0: what describes how this file's pixels are stored; a TIFF's are read as EXIF, and would be wrong elsewhere.
_LAYOUT_TAGS = (254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 317, 318, 319)
_LAYOUT_TAGS += (320, 321, 322, 323, 324, 325, 330, 332, 336, 338, 339, 340, 341, 347, 529, 530, 531, 532, 34675)
_FLOAT_STEPS = 65535  # numbers in 0..1 are kept with 16 bits
READABLE = "PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF ..."

# EXIF 2.32, section 4.6.4: where row 0 and column 0 of the stored pixels are in the picture that is meant.
_UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


class PictureError(HostError):
    """A file is no picture that can be upscaled; the message is one sentence without the file's name."""


@dataclass(frozen=True)
class Picture:
    """An upright picture and what its file said about it.

    pixels: (H, W, C) uint8 or uint16, C one of 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA).
    exif: begins with "Exif", its orientation set to upright; profile: ICC, of the pixels; notes: what was converted,
    one sentence each.
    """

    pixels: np.ndarray
    exif: bytes | None = None
    profile: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def deep(self) -> bool:
        """Whether samples have 16 bits."""
        return self.pixels.dtype == np.uint16

    @property
    def grey(self) -> bool:
        """Whether there is one channel of colour."""
        return self.pixels.shape[2] <= 2

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.pixels.shape[2] in (2, 4)


def read_content(source: str) -> bytes:
    """Returns the bytes of a picture's file; raises PictureError where they cannot be read."""
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror}") from error


def read_picture(content: bytes) -> Picture:
    """Returns the picture in a file's content.

    Raises PictureError for what is none, is damaged, moves, or is larger than Pillow's limit against
    decompression bombs (179 million pixels).
    """
    if not content:
        raise PictureError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large pictures, odd EXIF
            with Image.open(io.BytesIO(content)) as image:
                _refuse_moving(image)
                return _read(image, content)
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"is not a picture that can be read ({READABLE})") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"is too large: {error}".split(", could")[0]) from error
    except PictureError:
        raise
    except Exception as error:  # a damaged file may raise anything in its decoder
        raise PictureError(f"is damaged: {str(error).strip() or type(error).__name__}") from error


def _refuse_moving(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # a phone's JPEG whose other pictures are its own extras
        return
    if image.format == "TIFF":
        kinds = [getattr(page, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0) for page in ImageSequence.Iterator(image)]
        image.seek(0)
        frames = 1 + sum(not kind & _REDUCED for kind in kinds[1:])
        if frames == 1:
            return
        raise PictureError(f"has {frames} pages; accepted is one picture a file (split it, for example with tiffsplit)")
    raise PictureError(
        f"has {frames} frames; accepted is a still picture (split it: ffmpeg -i FILE frames/%05d.png, give the folder)"
    )


def _read(image: Image.Image, content: bytes) -> Picture:
    deep = image.mode in ("I;16", "I;16L", "I;16B") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    exif, profile = image.getexif(), image.info.get("icc_profile")
    orientation = exif.get(ORIENTATION, 1)
    if deep and image.mode in ("RGB", "RGBA", "LA"):
        pixels, notes = _deep_pixels(image, content)
        return _picture(pixels, exif, profile, orientation, notes)
    image.load()
    exif = image.getexif()  # again: a TIFF is turned upright as it is loaded
    orientation = exif.get(ORIENTATION, 1)
    plain, notes = _plain(image)
    return _picture(np.asarray(plain), exif, None if notes else profile, orientation, notes)


def _picture(pixels: np.ndarray, exif: Image.Exif, profile: Any, orientation: int, notes: tuple[str, ...]) -> Picture:
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    upright = _UPRIGHT.get(orientation, lambda a: a)(pixels)
    for tag in _LAYOUT_TAGS:
        exif.pop(tag, None)
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    return Picture(np.ascontiguousarray(upright), exif.tobytes() if len(exif) else None, profile or None, notes)


def _deep_pixels(image: Image.Image, content: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns RGB(A) or grey and alpha of 16 bits, which Pillow would read with 8."""
    import av
    from av.error import FFmpegError

    layout = "rgb48le" if image.mode == "RGB" else "rgba64le"
    try:
        with av.open(io.BytesIO(content)) as container:
            pixels = next(container.decode(video=0)).to_ndarray(format=layout)
    except (FFmpegError, StopIteration, ValueError):
        image.load()
        return np.asarray(image), ("its 16 bits could not be read; 8 were kept",)
    return (pixels[..., [0, 3]] if image.mode == "LA" else pixels), ()


def _plain(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Returns the image as L, LA, RGB, RGBA or I;16, and what had to be converted on the way."""
    mode = image.mode
    if mode in ("I;16", "I;16L", "I;16B"):
        return Image.fromarray(np.asarray(image).astype(np.uint16)), ()
    if mode in ("I", "F"):
        return Image.fromarray(_as_16_bits(np.asarray(image), mode)), ()
    if mode in ("CMYK", "LAB"):
        return _to_srgb(image), (f"{mode} was converted to sRGB",)
    if mode == "1":
        return image.convert("L"), ()
    if image.has_transparency_data:
        return image.convert("LA" if mode in ("L", "LA", "La") else "RGBA"), ()
    return (image if mode in ("L", "RGB") else image.convert("RGB")), ()


def _as_16_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Returns grey integers of 0..65535 as they are, and grey floats of 0..1 times 65535."""
    if not np.isfinite(values).all():
        raise PictureError("holds numbers that are NaN or infinite; accepted are floating-point numbers in 0..1")
    low, high = float(values.min()), float(values.max())
    limit = _FLOAT_STEPS if mode == "I" else 1.0
    if low < 0 or high > limit:
        raise PictureError(f"holds numbers of {low:g} to {high:g}; accepted are 0 to {limit:g} (scale them first)")
    return values.astype(np.uint16) if mode == "I" else np.rint(values * _FLOAT_STEPS).astype(np.uint16)


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source: Any = ImageCms.createProfile("LAB")
    elif profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    else:
        return image.convert("RGB")
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None, "a new image was asked for"
    return converted


def uploads(picture: Picture) -> list[bytes]:
    """Returns PNG files of 8 bits for ComfyUI: one, or for 16 bits one of the high and one of the low bytes.

    value/65535 = 256/257 high/255 + 1/257 low/255, which a node of ComfyUI's can add up.
    """
    pixels = picture.pixels
    if picture.grey:  # ComfyUI's reader takes the values of RGB(A) as they are, and converts others
        pixels = pixels[..., [0, 0, 0, 1][: 4 if picture.has_alpha else 3]]
    parts = [pixels >> 8, pixels & 255] if picture.deep else [pixels]
    return [_encode(Image.fromarray(_squeeze(part.astype(np.uint8))), "PNG", compress_level=1) for part in parts]


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Returns the nearest 8-bit values of uint8 or uint16."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Returns pixels (H, W, C) with 8 bits as Pillow has them: L, LA, RGB or RGBA."""
    return Image.fromarray(_squeeze(eight_bits(pixels)))


def _squeeze(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def open_picture(path: Path) -> Picture:
    """Returns the picture of a file; raises HostError that names the file."""
    try:
        return read_picture(path.read_bytes())
    except PictureError as error:
        raise HostError(f"{path} {error}") from error
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror or error}") from error
