"""Pictures of one colour each, and what became of them in a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from host.batch import Watcher
from host.batch.inputs import Item
from host.batch.making import Made
from host.batch.manifest import NAME, PART_PREFIX


def color_of(number: int) -> tuple[int, int, int]:
    return (number * 7 % 256, 10, 200)


def pictures(folder: Path, count: int, size: tuple[int, int] = (8, 6)) -> list[Path]:
    """Makes pictures of one colour each, which tells them apart."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"p{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", size, color_of(number)).save(path)
    return paths


def assert_inverted(output: Path, count: int) -> None:
    """Each result is there, is that of its own picture, and nothing half-made lies about."""
    for number in range(count):
        found = np.asarray(Image.open(output / f"p{number:03}.png").convert("RGB"))[0, 0].tolist()
        pairs = zip(found, color_of(number), strict=True)  # ComfyUI cuts what is behind the point off
        assert all(abs(255 - value - made) <= 1 for made, value in pairs), f"picture {number} is {found}"
    assert not list(output.rglob(f"{PART_PREFIX}*"))


def records(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / NAME).read_text().splitlines()]
    return [line for line in lines if "output" in line]


class Kept(Watcher):
    """Keeps what it is told; `after` is called with the number of results so far."""

    def __init__(self, after: Callable[[int], None] = lambda count: None) -> None:
        self.lines: list[str] = []
        self.servers: list[str] = []
        self.after = after

    def says(self, line: str) -> None:
        self.lines.append(line)

    def made(self, item: Item, made: Made, server: str) -> None:
        self.servers.append(server)
        self.after(len(self.servers))
