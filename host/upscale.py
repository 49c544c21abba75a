"""Upscales one picture through the HTTP API of a running ComfyUI, and saves the result and a before/after sheet."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .client import ComfyClient
from .errors import HostError
from .progress import ProgressLine
from .sheet import before_after_sheet
from .workflow import load_workflow, with_inputs


@dataclass(frozen=True)
class UpscaleRequest:
    """What to upscale, how, and where the result and the sheet go."""

    image: Path
    scale: float
    timestep: int
    output: Path

    @property
    def sheet(self) -> Path:
        """The path of the before/after sheet, beside the result."""
        return self.output.with_name(f"{self.output.stem}-sheet.png")


def open_picture(path: Path) -> Image.Image:
    """Returns the picture as it is meant to be seen (EXIF rotation applied); raises HostError if it is none."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise HostError(f"{path} is not a picture that can be read (PNG, JPEG, WebP, TIFF, BMP ...).") from error
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error}") from error


def upscale(client: ComfyClient, request: UpscaleRequest) -> float:
    """Runs the shipped workflow on the picture, writes both files, and returns the seconds ComfyUI took.

    Raises HostError with ComfyUI's own message when the workflow is refused or fails.
    """
    before = open_picture(request.image)
    prompt = with_inputs(
        load_workflow(),
        {
            "LoadImage": {"image": client.upload(request.image)},
            "TADSRUpscale": {"scale": request.scale, "timestep": request.timestep},
        },
    )
    run = client.run(prompt, ProgressLine(prompt))
    content = client.view(run.images()[0])
    after = Image.open(io.BytesIO(content))
    save_picture(content, request.output)
    enlarged = before.convert("RGB").resize(after.size, Image.Resampling.LANCZOS)
    labels = (f"Lanczos {request.scale:g}x", f"TADSR {request.scale:g}x, timestep {request.timestep}")
    before_after_sheet(list(zip(labels, (enlarged, after), strict=True))).save(request.sheet)
    return run.seconds


def save_picture(png: bytes, path: Path) -> None:
    """Writes a PNG to `path`: as it is for a .png (its metadata hold the workflow), else converted."""
    if path.suffix.lower() == ".png":
        path.write_bytes(png)
        return
    picture = Image.open(io.BytesIO(png))
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture = picture.convert("RGB")
    picture.save(path, quality=95)
