"""Makes one picture's result file from its content: the part that a server's thread, or a Ray actor, does."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

from ..pictures import read_content, read_picture
from ..results import Finish, Statistics, finished
from ..transfer import Transfer
from .frames import recolored
from .manifest import PART_PREFIX


@dataclass(frozen=True)
class Order:
    """What to make: the picture's content or file, its name, how to write the result, and where.

    folder: the folder of the result, where it is written under a name of its own until it is kept; None: the content
    comes back instead. colors: mean and deviation of each channel that the result should have, of 0..255.
    """

    name: str
    source: str
    suffix: str
    quality: int
    content: bytes | None = None
    folder: str | None = None
    colors: Statistics | None = None


@dataclass(frozen=True)
class Made:
    """A finished result: its part file or its content, digests and sizes, the seconds of the run, and notes."""

    part: str | None
    content: bytes | None
    input_sha256: str
    output_sha256: str
    output_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def make(order: Order, transfer: Transfer, stop: threading.Event | None = None) -> Made:
    """Reads the picture, sends it through ComfyUI and writes its result.

    Raises PictureError for a file that is no picture, OSError when the result cannot be written, and what
    `Transfer.run` does.
    """
    content = read_content(order.source) if order.content is None else order.content
    picture = read_picture(content)
    recolor = None
    if order.colors is not None:
        recolor = recolored(order.colors)
    finish = Finish(order.suffix, order.quality, recolor)
    png, run = transfer.run(picture, deep_result=finish.kind.deep, stop=stop)
    result = finished(png, picture, finish, transfer.carrier.described(os.path.basename(order.name)))
    notes = picture.notes
    if picture.deep and finish.kind.deep and not transfer.deep:
        notes += ("the server cannot write 16 bits; 8 were kept",)
    part = None if order.folder is None else str(write_part(result, Path(order.folder)))
    digests = [hashlib.sha256(data).hexdigest() for data in (content, result)]
    return Made(part, None if part else result, digests[0], digests[1], len(result), run.seconds, notes)


def write_part(content: bytes, folder: Path) -> Path:
    """Writes a result under a name of its own, on the disk when this returns; leaves nothing behind if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{PART_PREFIX}{uuid.uuid4().hex}"
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part
