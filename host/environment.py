"""Builds a Python environment in the cache, once for each set of requirements and Python version."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_directory, exclusive
from .commands import clean_environment, run_logged
from .errors import HostError

OLDEST_PYTHON = (3, 10)  # ComfyUI 0.30 and the packages it pins
# Pinned because they must fit together: torchvision 0.28.0 requires torch 2.13.0; torchaudio 2.11.0 is the
# newest there is and works with it (measured: ComfyUI starts with every core node imported).
TORCH_PINS = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")
NEEDED_DISK_BYTES = 4 * 1024**3  # measured: 2.4 GB with a CPU torch, and the packages' archives beside it
MARKER = "tadsr-complete.json"
SHIM_MODULE = "tadsr_torch_import_shim"
_DEBIAN_ADVICE = "On Debian and Ubuntu this Python needs its venv package first: sudo apt-get install python3-venv"
_INSTALL_ADVICE = (
    "Check the internet connection and the free disk space, then run the same command again. If a package has "
    "no version for this Python, use Python 3.10, 3.11, 3.12 or 3.13."
)


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment holds; two specs with the same contents share one directory."""

    requirement_files: tuple[Path, ...]
    pins: tuple[str, ...] = TORCH_PINS

    @property
    def directory(self) -> Path:
        """The directory of this environment in the cache, whether it exists or not."""
        version = "{}.{}".format(*sys.version_info[:2])
        parts = [*self.pins, *(file.read_text(encoding="utf-8") for file in self.requirement_files)]
        parts += [version, sys.platform, platform.machine()]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return cache_directory() / "environments" / f"py{version}-{digest[:12]}"

    @property
    def python(self) -> Path:
        """The interpreter inside the environment."""
        return interpreter(self.directory)

    def is_complete(self) -> bool:
        """Returns whether the environment was built to its end and its interpreter still runs."""
        return (self.directory / MARKER).is_file() and _runs(self.python)


def require_python() -> None:
    """Raises HostError if this Python is older than the oldest supported one."""
    if sys.version_info < OLDEST_PYTHON:
        raise HostError(
            "This needs Python {}.{} or newer; {} is {}.".format(
                *OLDEST_PYTHON, sys.executable, platform.python_version()
            )
        )


def interpreter(environment: Path) -> Path:
    """Returns the path of the Python interpreter in a virtual environment."""
    if sys.platform == "win32":
        return environment / "Scripts" / "python.exe"
    return environment / "bin" / "python"


def ensure_environment(spec: EnvironmentSpec) -> Path:
    """Builds the environment unless it is complete, and returns its interpreter.

    A half-built environment is removed and built again; a second process waits for the first.
    Raises HostError that names the failed command, its last lines and what to do.
    """
    require_python()
    directory = spec.directory
    if not spec.is_complete():
        with exclusive(directory):
            if not spec.is_complete():  # another process may have built it while this one waited
                _build(spec, directory)
    _install_shim(directory)
    return spec.python


def _build(spec: EnvironmentSpec, directory: Path) -> None:
    _require_disk(directory)
    print(f"Building the Python environment {directory} (once; about 2.5 GB with a CPU torch)", flush=True)
    create_virtual_environment(directory)
    requirements = [word for file in spec.requirement_files for word in ("-r", file)]
    run_logged(
        [spec.python, "-m", "pip", "install", "--no-input", "--progress-bar", "off", *spec.pins, *requirements],
        doing="Installing packages",
        advice=_INSTALL_ADVICE,
        log=directory.with_name(directory.name + ".log"),
    )
    contents = {"pins": spec.pins, "requirements": [file.name for file in spec.requirement_files]}
    (directory / MARKER).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def _install_shim(directory: Path) -> None:
    """Makes every Python of the environment run the import shim; also brings an older copy up to date."""
    source = Path(__file__).with_name("torch_import_shim.py").read_text(encoding="utf-8")
    start = f"import {SHIM_MODULE}; {SHIM_MODULE}.install()\n"
    for name, content in ((f"{SHIM_MODULE}.py", source), (f"{SHIM_MODULE}.pth", start)):
        file = _site_packages(directory) / name
        if not file.is_file() or file.read_text(encoding="utf-8") != content:
            new = file.with_suffix(f".{os.getpid()}.new")
            new.write_text(content, encoding="utf-8")
            new.replace(file)


def _site_packages(directory: Path) -> Path:
    if sys.platform == "win32":
        return directory / "Lib" / "site-packages"
    return directory / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"


def _require_disk(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < NEEDED_DISK_BYTES:
        raise HostError(
            f"{directory.parent} has {free / 1024**3:.1f} GB of free disk space; "
            f"{NEEDED_DISK_BYTES / 1024**3:.0f} GB are needed. "
            "Free some, or set the environment variable TADSR_CACHE to a directory on a larger disk."
        )


def create_virtual_environment(directory: Path) -> None:
    """Makes a new virtual environment with pip at `directory`, replacing whatever was there."""
    if importlib.util.find_spec("ensurepip") is None:
        raise HostError(f"{sys.executable} cannot make virtual environments (no ensurepip).\n{_DEBIAN_ADVICE}")
    if directory.exists():
        shutil.rmtree(directory)
    run_logged(
        [sys.executable, "-m", "venv", directory],
        doing="Making a virtual environment",
        advice=_DEBIAN_ADVICE,
        log=directory.with_name(directory.name + ".log"),
    )


def pip_command() -> list[str]:
    """Returns the start of a pip command: this Python's pip, else that of a small environment made for it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = EnvironmentSpec(requirement_files=(), pins=())
    with exclusive(spec.directory):
        if not spec.is_complete():
            create_virtual_environment(spec.directory)
            (spec.directory / MARKER).write_text("{}", encoding="utf-8")
    return [str(spec.python), "-m", "pip"]


def _runs(python: Path) -> bool:
    try:
        result = subprocess.run([python, "-c", ""], env=clean_environment(), capture_output=True)  # noqa: S603
    except OSError:
        return False
    return result.returncode == 0
