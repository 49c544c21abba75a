"""Chooses the ComfyUI and the Python that a program runs with, and runs the program again in that Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .comfyui import existing_comfyui, fetch_comfyui, own_python
from .commands import clean_environment
from .environment import EnvironmentSpec, ensure_environment, require_python

REPOSITORY = Path(__file__).resolve().parent.parent
INSIDE_VARIABLE = "TADSR_INSIDE"  # holds the ComfyUI folder once a program runs in the chosen Python


@dataclass(frozen=True)
class Runtime:
    """A ComfyUI folder and the interpreter that has its packages."""

    comfyui: Path
    python: Path


def environment_of_tests(comfyui: Path) -> EnvironmentSpec:
    """Returns the environment of the tests: ComfyUI's packages, training's and the development tools."""
    files = [REPOSITORY / name for name in ("requirements-training.txt", "requirements-dev.txt")]
    return EnvironmentSpec((comfyui / "requirements.txt", *files))


def prepare_tests() -> Runtime:
    """Fetches ComfyUI and builds the environment of the tests, where they are not there yet."""
    require_python()
    comfyui = fetch_comfyui()
    return Runtime(comfyui, ensure_environment(environment_of_tests(comfyui)))


def prepare_comfyui(existing: Path | None = None) -> Runtime:
    """Returns a ComfyUI that can be started: `existing` with its own Python if it has one, else our own.

    Raises HostError that says what failed and what to do.
    """
    require_python()
    if existing is not None:
        comfyui = existing_comfyui(existing)
        if python := own_python(comfyui):
            return Runtime(comfyui, python)
    else:
        comfyui = fetch_comfyui()
    for_tests = environment_of_tests(comfyui)
    # That of the tests holds all that ComfyUI needs: no second one of several GB where it is there.
    spec = for_tests if for_tests.is_complete() else EnvironmentSpec((comfyui / "requirements.txt",))
    return Runtime(comfyui, ensure_environment(spec))


def chosen_comfyui() -> Path | None:
    """Returns the ComfyUI folder that `run_again` chose, or None before it."""
    value = os.environ.get(INSIDE_VARIABLE)
    return Path(value) if value else None


def run_again(
    runtime: Runtime, script: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> NoReturn:
    """Runs `script` in the Python of `runtime`, in place of this process, and ends with its exit code."""
    command = [str(runtime.python), str(script), *arguments]
    environment = clean_environment(**{INSIDE_VARIABLE: str(runtime.comfyui), **(variables or {})})
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)  # noqa: S606 - our own program
    sys.exit(subprocess.run(command, env=environment).returncode)  # noqa: S603
