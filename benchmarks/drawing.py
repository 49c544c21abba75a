"""Measures what becomes of flat colours: `python -m benchmarks.drawing [--weights FILE]`.

A drawing of flat areas with black outlines is enlarged three times; for each colour match and timestep, the table gives
how far the colours of the areas moved, inside them. The exit status is 1 where an area moved by more than three levels
with the weights' own colour match. Writes the drawing and the results as PNG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.quality import WEIGHTS
from host.cache import cache_directory
from host.sheet import before_after_sheet
from tadsr.color import COLOR_MATCHES
from training.evaluate import timesteps_in
from training.images import BYTE_MAX, to_picture, to_tensor
from training.networks.inference import Restorer

SIZE, SCALE, FINER = 160, 3, 4  # FINER: the drawing is made so much larger, and its edges are soft as a result
MOST = 3.0  # levels
INK = (0, 0, 0)
SKY, GRASS, SKIN, DRESS = (86, 143, 255), (66, 170, 60), (250, 214, 190), (255, 166, 214)
HAIR, WALL, SUN, CLOUD, DOOR = (96, 52, 30), (238, 226, 200), (255, 236, 64), (255, 255, 255), (150, 20, 40)


class Area(NamedTuple):
    """An area of the drawing: where it is measured, (left, top, right, bottom) inside it, and its colour."""

    name: str
    box: tuple[int, int, int, int]
    colour: tuple[int, int, int]


AREAS = (
    Area("sky", (70, 6, 110, 30), SKY),
    Area("grass", (84, 132, 154, 154), GRASS),
    Area("skin", (33, 53, 47, 62), SKIN),
    Area("dress", (32, 102, 48, 136), DRESS),
    Area("wall", (98, 84, 116, 112), WALL),
    Area("door", (124, 92, 138, 112), DOOR),
    Area("sun", (136, 12, 148, 24), SUN),
    Area("cloud", (22, 16, 44, 24), CLOUD),
)


def draw() -> np.ndarray:
    """Returns the drawing, (SIZE, SIZE, 3) uint8."""
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), SKY)
    pen = ImageDraw.Draw(image)

    def scaled(*points: float) -> list[float]:
        return [FINER * value for value in points]

    outline = {"outline": INK, "width": FINER * 3 // 2}
    pen.rectangle(scaled(0, 120, SIZE, SIZE), GRASS, **outline)
    pen.ellipse(scaled(128, 4, 156, 32), SUN, **outline)
    pen.rounded_rectangle(scaled(8, 8, 58, 32), FINER * 11, CLOUD, **outline)
    pen.rectangle(scaled(90, 76, 148, 122), WALL, **outline)
    pen.polygon(scaled(84, 76, 119, 46, 154, 76), HAIR, **outline)
    pen.rectangle(scaled(118, 86, 144, 122), DOOR, **outline)
    pen.ellipse(scaled(18, 42, 62, 88), HAIR, **outline)
    pen.ellipse(scaled(24, 48, 56, 84), SKIN, **outline)
    pen.polygon(scaled(30, 86, 50, 86, 64, 146, 16, 146), DRESS, **outline)
    pen.ellipse(scaled(32, 66, 36, 70), INK)
    pen.ellipse(scaled(44, 66, 48, 70), INK)
    pen.arc(scaled(33, 68, 47, 79), 20, 160, INK, FINER)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def shifts(result: np.ndarray, scale: int) -> dict[str, float]:
    """Returns by area the largest distance of a channel's mean and, if more, median from its colour, in levels.

    result: the enlarged drawing, (scale * SIZE, scale * SIZE, 3) uint8.
    """
    moved = {}
    for name, box, colour in AREAS:
        left, top, right, bottom = (scale * side for side in box)
        pixels = result[top:bottom, left:right].reshape(-1, 3).astype(float)
        middles = np.stack([pixels.mean(axis=0), np.median(pixels, axis=0)])
        moved[name] = float(np.abs(middles - colour).max())
    return moved


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, default=WEIGHTS, help="default: the bundled model")
    add("--timesteps", type=timesteps_in, default=(100, 500, 900), help="default: 100,500,900")
    add("--output", type=Path, default=cache_directory() / "drawing", help="folder of the pictures")
    arguments = parser.parse_args(argv)
    restorer = Restorer.load(arguments.weights)
    drawing = draw()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"| colour match | timestep | largest | {' | '.join(area.name for area in AREAS)} |")
    print("|---|---|---|" + "---|" * len(AREAS))
    worst = 0.0
    for match in COLOR_MATCHES:
        for timestep in arguments.timesteps:
            result = to_picture(restorer(to_tensor(drawing), timestep, SCALE, match=match))
            moved = shifts(np.asarray(result), SCALE)
            largest = max(moved.values())
            cells = " | ".join(f"{value:.1f}" for value in moved.values())
            print(f"| {match} | {timestep} | {largest:.1f} | {cells} |", flush=True)
            worst = max(worst, largest) if match == restorer.color_match else worst
            before = Image.fromarray(drawing).resize(result.size, Image.Resampling.NEAREST)
            pair = [("drawing", before), (f"t={timestep}, {match}", result)]
            before_after_sheet(pair).save(arguments.output / f"{match}-{timestep}.png")
    print(
        f"{restorer.color_match}, the default: at most {worst:.1f} levels of {BYTE_MAX:g}; pictures: {arguments.output}"
    )
    return int(worst > MOST)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
