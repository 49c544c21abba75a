"""Packages that only some programs need, in a folder of the cache beside the environment that they are used with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from .cache import cache_directory, exclusive
from .commands import clean_environment, run_logged
from .interpreter import REPOSITORY, Runtime

RAY_REQUIREMENTS = REPOSITORY / "requirements-ray.txt"
_VERSION = "import sys; print('{}.{}'.format(*sys.version_info[:2]))"


def ray_path(runtime: Runtime) -> str:
    """Returns the PYTHONPATH with which Ray, and this repository, are found by `runtime` and all that it starts.

    Installs Ray into the cache first where it is not there. Raises HostError, with pip's words, when that fails.
    """
    parts = [str(REPOSITORY)]
    if not _has(runtime.python, "ray"):
        parts.append(str(overlay(RAY_REQUIREMENTS, runtime.python)))
    return os.pathsep.join(parts)


def overlay(requirements: Path, python: Path) -> Path:
    """Returns a folder of the packages in a requirements file for a Python, installing them where it is not there."""
    version = subprocess.run(  # noqa: S603
        [python, "-c", _VERSION], env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout.strip()
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache_directory() / "packages" / f"py{version}-{requirements.stem}-{digest}"
    if not folder.is_dir():
        with exclusive(folder):
            if not folder.is_dir():  # another process may have installed it while this one waited
                _install(requirements, python, folder)
    return folder


def _install(requirements: Path, python: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "packages"
        run_logged(
            [*(python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off")]
            + ["--target", target, "-r", requirements],
            doing=f"Installing {requirements.name}",
            advice=f"Check the internet connection, or install it yourself: {python} -m pip install -r {requirements}",
            log=folder.with_name(folder.name + ".log"),
        )
        os.replace(target, folder)


def _has(python: Path, module: str) -> bool:
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    command = [python, "-c", question]
    return subprocess.run(command, env=clean_environment(), capture_output=True).returncode == 0  # noqa: S603
