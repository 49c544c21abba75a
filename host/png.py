"""The chunks of a PNG file: reading its header, and putting metadata in without touching the pixels.

Source: PNG (Portable Network Graphics) Specification, Third Edition, sections 5 and 11.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import HostError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOR_OF_CHANNELS = {1: 0, 2: 4, 3: 2, 4: 6}  # table 8: grey, grey and alpha, RGB, RGBA
_CHANNELS_OF_COLOR = {color: channels for channels, color in COLOR_OF_CHANNELS.items()} | {3: 1}
_REPLACED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")

Chunk = tuple[bytes, bytes]


@dataclass(frozen=True)
class Header:
    """What IHDR states: pixels, bits of a sample, channels (a palette counts as one)."""

    width: int
    height: int
    bits: int
    channels: int


def header(png: bytes) -> Header:
    """Returns the header of a PNG file; raises HostError if it is none, or was cut off."""
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR" or png[-8:-4] != b"IEND":
        raise HostError(f"the server sent {len(png)} bytes that are not a whole PNG file (they begin {png[:12]!r})")
    width, height, bits, color = struct.unpack(">IIBB", png[16:26])
    return Header(width, height, bits, _CHANNELS_OF_COLOR.get(color, 0))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk as it stands in a file: length, type, data, CRC."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_chunk(keyword: str, text: str) -> Chunk:
    """Returns a tEXt chunk; characters outside Latin-1 become question marks (JSON has none)."""
    return b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1", errors="replace")


def profile_chunk(profile: bytes) -> Chunk:
    """Returns the chunk of an ICC profile."""
    return b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)


def with_metadata(png: bytes, chunks: Iterable[Chunk]) -> bytes:
    """Returns the file with the given metadata in place of its own: texts, profile, colour space, EXIF."""
    parts = [SIGNATURE]
    for kind, whole in _chunks(png):
        if kind not in _REPLACED:
            parts.append(whole)
        if kind == b"IHDR":  # before the pixels, as 5.6 wants for iCCP
            parts += [chunk(*one) for one in chunks]
    return b"".join(parts)


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (type, the whole chunk)."""
    position = len(SIGNATURE)
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        end = position + 12 + length
        yield png[position + 4 : position + 8], png[position:end]
        position = end
