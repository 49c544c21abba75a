"""Installs what only the benchmarks use into the cache, a folder for each package, and lets Python import from there.

The packages and their versions are those of `requirements.txt` beside this file. They are installed without their
dependencies, so that the environment stays as it is; its own packages come first when Python looks for a module.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from host.cache import cache_directory, exclusive
from host.commands import run_logged
from host.environment import pip_command
from host.errors import HostError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def pinned(requirements: Path = REQUIREMENTS) -> dict[str, str]:
    """Returns the version of each package in a list of lines `name==version`."""
    lines = (line.strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def install(name: str) -> Path:
    """Returns the folder of a package in `requirements.txt`, installing it there when it is not there yet.

    Raises HostError, with pip's command, where it cannot be had, ValueError for a name that is not in the list.
    """
    versions = pinned()
    if name not in versions:
        raise ValueError(f"{name} is not among the benchmarks' packages; accepted: {', '.join(versions)}")
    python = "py{}.{}".format(*sys.version_info[:2])
    folder = cache_directory() / "benchmarks" / "packages" / python / f"{name}-{versions[name]}"
    if not folder.is_dir():
        with exclusive(folder):
            if not folder.is_dir():  # another process may have installed it while this one waited
                _install(f"{name}=={versions[name]}", folder)
    return folder


def make_importable(*names: str) -> None:
    """Installs the packages and appends their folders to `sys.path`. Errors as `install`."""
    for name in names:
        folder = str(install(name))
        if folder not in sys.path:
            sys.path.append(folder)


def reason(error: Exception) -> str:
    """Returns why a package cannot be had on one line, with pip's command if that is what failed."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join([lines[0], *(line for line in lines[1:] if line.startswith("Command: "))])


def _install(requirement: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "package"
        pip = [*pip_command(), "install", "--no-input", "--disable-pip-version-check", "--no-deps"]
        run_logged(
            [*pip, "--target", target, requirement],
            doing=f"Installing {requirement} for the benchmarks",
            advice="Check the internet connection; libsvm-official also needs a C++ compiler.",
            log=folder.with_name(folder.name + ".log"),
        )
        if not target.is_dir():
            raise HostError(f"pip installed nothing for {requirement}")
        os.replace(target, folder)
