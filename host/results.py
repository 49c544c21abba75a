"""Makes the file of a result: the pixels that ComfyUI sent, with what the source's file held."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from .errors import HostError
from .pictures import EXIF_IFD, Picture, as_image, eight_bits
from .png import Chunk, Header, header, profile_chunk, text_chunk, with_metadata

_ONE = Fraction(1)  # PyAV wants a time base, even for one frame
EXIF_START = b"Exif\0\0"
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003  # EXIF 2.32, table 8: the size that the picture says it has
_LONGEST_EXIF = 65533 - len(EXIF_START)  # of one JPEG segment
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes grey
_DEEP_LAYOUTS = {1: ("gray16le", "gray16be"), 3: ("rgb48le", "rgb48be"), 4: ("rgba64le", "rgba64be")}

Recolor = Callable[[np.ndarray], np.ndarray]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, deviation of R, G, B in 0..255


@dataclass(frozen=True)
class Kind:
    """A file format: Pillow's name, the longest side that it can hold, and what else it can."""

    name: str
    longest: int
    alpha: bool
    deep: bool = False
    lossy: bool = False


KINDS: Mapping[str, Kind] = {
    ".png": Kind("PNG", 2**31 - 1, alpha=True, deep=True),
    ".jpg": Kind("JPEG", 65535, alpha=False, lossy=True),
    ".jpeg": Kind("JPEG", 65535, alpha=False, lossy=True),
    ".webp": Kind("WebP", 16383, alpha=True, lossy=True),
    ".tif": Kind("TIFF", 2**31 - 1, alpha=True),
    ".tiff": Kind("TIFF", 2**31 - 1, alpha=True),
    ".bmp": Kind("BMP", 2**31 - 1, alpha=False),
}
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class Finish:
    """How a result is written: the suffix of its file, the quality of a lossy one, and a change of its colours."""

    suffix: str = ".png"
    quality: int = DEFAULT_QUALITY
    recolor: Recolor | None = None

    @property
    def kind(self) -> Kind:
        """The format of the suffix."""
        return KINDS[self.suffix.lower()]


def finished(png: bytes, source: Picture, finish: Finish, prompt: Mapping[str, Any] | None = None) -> bytes:
    """Returns the file of a result, grey where the source is, with its alpha, EXIF and colour profile.

    png: what ComfyUI saved. A PNG that fits already gets its metadata without being coded again; `prompt` goes into
    it as ComfyUI puts it there. Transparency in a format without it is laid on white.
    Raises HostError for a result that the format cannot hold.
    """
    head, kind = header(png), finish.kind
    if max(head.width, head.height) > kind.longest:
        raise HostError(f"the result is {head.width}x{head.height}; {kind.name} holds at most {kind.longest} a side")
    fits = head.channels == source.pixels.shape[2] and finish.recolor is None
    if kind.name == "PNG" and fits:
        return with_metadata(png, _chunks(source, head, prompt))
    pixels = _decoded(png, head)
    if finish.recolor is not None:
        pixels[..., :3] = finish.recolor(pixels)
    return _encoded(_like_source(pixels, source), source, finish, prompt)


def _decoded(png: bytes, head: Header) -> np.ndarray:
    """Returns (H, W, 3 or 4), uint8 or uint16; a copy that may be written to."""
    if head.bits == 16:
        import av

        layout = _DEEP_LAYOUTS[4 if head.channels in (2, 4) else 3][0]
        with av.open(io.BytesIO(png)) as container:
            return next(container.decode(video=0)).to_ndarray(format=layout).copy()
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGBA" if head.channels in (2, 4) else "RGB"))


def _like_source(pixels: np.ndarray, source: Picture) -> np.ndarray:
    """Returns the pixels with the channels of the source: alpha enlarged where the workflow lost it, grey if it was."""
    color, alpha = pixels[..., :3], pixels[..., 3:]
    if source.has_alpha and alpha.shape[2] == 0:
        image = as_image(source.pixels[..., -1:]).resize(color.shape[1::-1], Image.Resampling.LANCZOS)
        alpha = np.asarray(image)[..., None].astype(pixels.dtype) * (257 if pixels.dtype == np.uint16 else 1)
    if source.grey:
        color = np.rint(color @ np.array(_LUMA)).astype(pixels.dtype)[..., None]
    return np.concatenate([color, alpha], axis=2) if source.has_alpha else color


def _encoded(pixels: np.ndarray, source: Picture, finish: Finish, prompt: Mapping[str, Any] | None) -> bytes:
    kind = finish.kind
    if kind.deep and pixels.dtype == np.uint16:
        if pixels.shape[2] == 2:  # PyAV takes no grey with alpha of 16 bits
            pixels = pixels[..., [0, 0, 0, 1]]
        png = _deep_png(pixels)
        return with_metadata(png, _chunks(source, header(png), prompt))
    image = as_image(eight_bits(pixels))
    if source.has_alpha and not kind.alpha:
        image = _on_white(image)
    content = io.BytesIO()
    image.save(content, kind.name, **_options(source, image, finish))
    png = content.getvalue()
    return with_metadata(png, _chunks(source, header(png), prompt)) if kind.name == "PNG" else png


def _on_white(image: Image.Image) -> Image.Image:
    mode = "L" if image.mode == "LA" else "RGB"
    white = Image.new(image.mode, image.size, "white")
    return Image.alpha_composite(white.convert("RGBA"), image.convert("RGBA")).convert(mode)


def _options(source: Picture, image: Image.Image, finish: Finish) -> dict[str, Any]:
    kind = finish.kind
    if kind.name == "PNG":  # its metadata come as chunks
        return {"compress_level": 1}
    options: dict[str, Any] = {"quality": finish.quality} if kind.lossy else {}
    exif = _exif(source, image.size)
    if exif and not (kind.name == "JPEG" and len(exif) > _LONGEST_EXIF):
        options["exif"] = exif
    if source.profile and (image.mode in ("L", "LA") and kind.name != "WebP") == source.grey:
        options["icc_profile"] = source.profile
    return options if kind.name != "BMP" else {}


def _chunks(source: Picture, head: Header, prompt: Mapping[str, Any] | None) -> list[Chunk]:
    chunks: list[Chunk] = []
    if source.profile and (head.channels <= 2) == source.grey:  # a grey profile fits grey pixels only
        chunks.append(profile_chunk(source.profile))
    exif = _exif(source, (head.width, head.height))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(EXIF_START)))
    if prompt is not None:
        chunks.append(text_chunk("prompt", json.dumps(prompt)))
    return chunks


def _exif(source: Picture, size: tuple[int, int]) -> bytes | None:
    """Returns the source's EXIF with the result's size, where it states one."""
    if source.exif is None:
        return None
    exif = Image.Exif()
    exif.load(source.exif)
    details = exif.get_ifd(EXIF_IFD)
    for tag, value in zip((_PIXEL_X, _PIXEL_Y), size, strict=True):
        if tag in details:
            details[tag] = value
    return exif.tobytes()


def _deep_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG file of (H, W, 1, 3 or 4) uint16."""
    import av

    frame_layout, stream_layout = _DEEP_LAYOUTS[pixels.shape[2]]
    array = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=frame_layout)
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = pixels.shape[1], pixels.shape[0], stream_layout
    codec.time_base = _ONE
    packets = [*codec.encode(frame.reformat(format=stream_layout)), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)
