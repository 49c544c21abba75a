"""Upscales one picture through the HTTP API of a running ComfyUI, and saves the result and a before/after sheet."""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .batch.making import write_part
from .carrier import carrier
from .client import ComfyClient
from .errors import HostError
from .pictures import Picture, as_image
from .progress import ProgressLine
from .results import Finish, finished
from .sheet import before_after_sheet
from .transfer import Transfer, can_write_16_bits
from .workflow import load_workflow, with_inputs

SHOWN_GROUND = "white"  # transparency on the sheet is laid on it


@dataclass(frozen=True)
class UpscaleRequest:
    """What to upscale, how, and where the result and the sheet go."""

    picture: Picture
    name: str
    scale: float
    timestep: int
    output: Path

    @property
    def sheet(self) -> Path:
        """The path of the before/after sheet, beside the result."""
        return self.output.with_name(f"{self.output.stem}-sheet.png")


def upscale(client: ComfyClient, request: UpscaleRequest) -> float:
    """Runs the shipped workflow on the picture, writes both files, and returns the seconds ComfyUI took.

    The result keeps the picture's alpha, EXIF and colour profile, and 16 bits in a PNG.
    Raises HostError with ComfyUI's own message when the workflow is refused or fails, and where nothing can be written.
    """
    settings = {"scale": request.scale, "timestep": request.timestep}
    carried = carrier(with_inputs(load_workflow(), {"TADSRUpscale": settings}))
    transfer = Transfer(client, carried, f"quickstart-{uuid.uuid4().hex}", deep=can_write_16_bits(client))
    finish = Finish(request.output.suffix)
    shown = ProgressLine(carried.prompt)
    png, run = transfer.run(request.picture, deep_result=finish.kind.deep, on_event=shown)
    content = finished(png, request.picture, finish, carried.described(request.name))
    _write(content, request.output)
    before, after = _shown(as_image(request.picture.pixels)), _shown(Image.open(io.BytesIO(content)))
    enlarged = before.resize(after.size, Image.Resampling.LANCZOS)
    labels = (f"Lanczos {request.scale:g}x", f"TADSR {request.scale:g}x, timestep {request.timestep}")
    sheet = io.BytesIO()
    before_after_sheet(list(zip(labels, (enlarged, after), strict=True))).save(sheet, "PNG")
    _write(sheet.getvalue(), request.sheet)
    return run.seconds


def _write(content: bytes, target: Path) -> None:
    """Writes a file whole or not at all: one of its name stays as it was until then. Raises HostError."""
    try:
        write_part(content, target.parent).replace(target)
    except OSError as error:
        raise HostError(f"{target} could not be written ({len(content):,} bytes): {error.strerror}") from error


def _shown(image: Image.Image) -> Image.Image:
    """Returns RGB to look at: transparency on white, 16 bits as 8."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, SHOWN_GROUND), image).convert("RGB")
