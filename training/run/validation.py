"""Validation while a run goes: scores of held-out pictures at several timesteps, and a sheet to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.images import BYTE_MAX, to_picture
from training.metrics.reference import Reference
from training.run.build import Run

SHEETS_FOLDER = "validation"
LABEL_HEIGHT, FONT_SIZE = 28, 16
LEAST_COLUMN = 128  # pixels, so that labels fit; smaller pictures are shown magnified
INK, BACKGROUND = "white", "black"


@torch.no_grad()
def validate(run: Run, step: int, device: torch.device) -> dict[str, float]:
    """Returns PSNR-Y and LPIPS (VGG), means over the held-out pictures, by timestep; writes `step-N.png`.

    The student runs in its mode, as the nodes do; prompts are the pictures' own. PSNR-Y of a pair is that of
    `training.evaluate`: of all pixels, in 8 bits. The parameters and all random numbers stay as they were.
    """
    timesteps, validation = run.config.validation_timesteps, run.data.validation
    restorer, perceptual = run.restorer(), run.objective.perceptual
    scores: dict[str, list[float]] = {}
    rows = []
    for sample in (validation[index] for index in range(len(validation))):
        lq, hq = (_unit(image[None].to(device)) for image in (sample.lq, sample.hq))  # lq is enlarged already
        reference = Reference(hq, [perceptual])
        context = run.context((sample.prompt,)).to(device)
        with run.autocast():
            results = [_in_bytes(restorer(lq, timestep, scale=1, context=context)) for timestep in timesteps]
        for timestep, result in zip(timesteps, results, strict=True):
            score = reference.score(result)
            scores.setdefault(f"validation/psnr_y/t{timestep}", []).append(score.psnr_y)
            scores.setdefault(f"validation/lpips/t{timestep}", []).append(score.lpips[perceptual.net])
        rows.append([lq, *results, hq])
    names = ["input", *(f"t = {timestep}" for timestep in timesteps), "photograph"]
    write_sheet(run.config.output / SHEETS_FOLDER / f"step-{step:08d}.png", names, rows)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def write_sheet(path: Path, names: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> None:
    """Writes pictures, (1, 3, H, W) in [0, 1], of one size: a row for each list, a label for each column."""
    side = rows[0][0].shape[3]
    factor = math.ceil(LEAST_COLUMN / side)
    height, width = (factor * length for length in rows[0][0].shape[2:])
    sheet = Image.new("RGB", (width * len(names), LABEL_HEIGHT + height * len(rows)), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, name in enumerate(names):
        draw.text((column * width + 4, 4), name, fill=INK, font=font)
        for row, pictures in enumerate(rows):
            shown = to_picture(pictures[column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (column * width, LABEL_HEIGHT + row * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _unit(image: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return image / 2 + 0.5


def _in_bytes(image: Tensor) -> Tensor:
    """Rounds [0, 1] to the values that a file of 8 bits holds."""
    return (image * BYTE_MAX).round() / BYTE_MAX
