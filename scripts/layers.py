"""Draws the layers in CONTRIBUTING.md anew from the imports: `python scripts/layers.py`.

The names, their order and what is said of them are kept; a new folder gets its line by hand. Needs Python alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "CONTRIBUTING.md"
HEADING, FENCE, ARROW = "## Architecture", "```\n", "<-"
WHOLE = ("tadsr", "host", "benchmarks")  # not told apart by their folders


def folder_of(parts: Sequence[str]) -> str:
    """Returns what the list calls the folder of a module, by its dotted parts; empty for others."""
    if parts[0] in WHOLE:
        return parts[0]
    name = "/".join(parts[:2])
    return name if parts[0] in ("nodes", "training") and (REPOSITORY / name).is_dir() else ""


def folders_reached(file: Path) -> set[str]:
    """Returns the folders of the list which a file imports from."""
    here, reached = file.relative_to(REPOSITORY).parts, set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            reached |= {folder_of(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [*(here[: len(here) - node.level] if node.level else ()), *(node.module or "").split(".")]
            reached |= {folder_of([*filter(None, start), alias.name]) for alias in node.names}
    return reached - {""}


def imports(folder: str) -> set[str]:
    """Returns the other folders of the list that a folder's files import from."""
    return set().union(*map(folders_reached, (REPOSITORY / folder).rglob("*.py"))) - {folder}


def layers(text: str) -> list[tuple[str, str]]:
    """Returns the list in a page's text: each folder, and what it is."""
    lines = text.partition(HEADING)[2].split(FENCE)[1].splitlines()
    found = [line.partition(ARROW)[0].split(maxsplit=1) for line in lines]
    return [(name, meaning.strip()) for name, meaning in found]


def drawn(text: str) -> str:
    """Returns the page's text with the list as the imports have it, in its own order."""
    rows = layers(text)
    order = [name for name, _ in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    new = ""
    for name, meaning in rows:
        found = sorted(imports(name), key=order.index)
        arrow = f"{ARROW} {' '.join(dict.fromkeys(_called(other, name) for other in found))}" if found else ""
        new += f"{name:{widths[0]}} {meaning:{widths[1]}} {arrow}".rstrip() + "\n"
    before, heading, after = text.partition(HEADING)
    opening, _, closing = after.split(FENCE, 2)
    return FENCE.join((before + heading + opening, new, closing))


def _called(folder: str, by: str) -> str:
    """Returns the last part of a folder's name within its package; elsewhere the package's."""
    package, _, rest = folder.partition("/")
    return rest if rest and by.startswith(f"{package}/") else package


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
