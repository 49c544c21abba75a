"""Says whose the photographs are: licences and authors from packages, and the table of credits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scripts.photo_sources import PhotoSource


@dataclass(frozen=True)
class Credit:
    """Licence and author of one picture, as stated; the author is empty where the package names none."""

    licence: str
    author: str = ""


def package_credit(source: PhotoSource, inside: str, files: Path) -> Credit:
    """Returns the credit of the file ``inside`` a package: its own in a Debian copyright file, else the package's.

    Only a paragraph that names the picture more closely than ``*`` counts as its own.
    """
    copyright_file = files / "usr/share/doc" / source.name / "copyright"
    if source.registry != "deb" or not copyright_file.is_file():
        return Credit(source.licence)
    own = debian_credit(copyright_file.read_text(encoding="utf-8"), Path(inside).name)
    return own or Credit(source.licence)


def debian_credit(text: str, name: str) -> Credit | None:
    """Returns the credit of the file called ``name`` in a machine-readable Debian copyright file, if it is named."""
    found = None
    for paragraph in text.split("\n\n"):
        fields = debian_fields(paragraph)
        patterns = [Path(pattern).name for pattern in fields.get("files", "").split()]
        if "license" in fields and any(pattern != "*" and fnmatch(name, pattern) for pattern in patterns):
            found = Credit(fields["license"].splitlines()[0], author_names(fields.get("copyright", "")))
    return found


def author_names(holders: str) -> str:
    """Returns years and names of copyright holders, one a line, on one line and without mail addresses."""
    return "; ".join(re.sub(r"<[^>]*>\S*", "", line).strip() for line in holders.splitlines())


def debian_fields(paragraph: str) -> dict[str, str]:
    """Returns the fields of one paragraph, names in lower case, continuation lines joined by line breaks."""
    fields: dict[str, str] = {}
    current = ""
    for line in paragraph.splitlines():
        if line[:1] in (" ", "\t"):
            fields[current] = f"{fields.get(current, '')}\n{line.strip()}"
        elif ":" in line:
            current, _, value = line.partition(":")
            current = current.lower()
            fields[current] = value.strip()
    return fields


def credits_table(pictures: list[Mapping[str, Any]]) -> str:
    """Returns Markdown: a table of packages, and a list of the pictures whose authors are named one by one."""
    count = Counter((entry["tier"], entry["package"], entry["version"]) for entry in pictures)
    licences: dict[str, set[str]] = {}
    for entry in pictures:
        licences.setdefault(entry["package"], set()).add(entry["licence"])
    lines = ["| package | version | tier | licence as stated | pictures |", "|---|---|---|---|---|"]
    for (tier, package, version), number in sorted(count.items()):
        lines.append(f"| {package} | {version} | {tier} | {', '.join(sorted(licences[package]))} | {number} |")
    lines += ["", "Pictures whose packages name the author of each:", ""]
    named = sorted((entry["package"], Path(entry["path"]).name, entry) for entry in pictures if entry["author"])
    lines += [f"- {package}: {name}, {entry['author']} ({entry['licence']})" for package, name, entry in named]
    return "\n".join(lines)
