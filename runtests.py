"""Runs every check of this repository: `python runtests.py [pytest arguments]`.

Needs Python 3.10 or newer and the internet for the first run, which sets up a Python environment and ComfyUI in
a per-user cache directory (set TADSR_CACHE for another place). With --lint, only lint, format and types.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from host.browser import find_browser, install_browser
from host.commands import clean_environment
from host.errors import HostError
from host.interpreter import prepare_tests

REPOSITORY = Path(__file__).resolve().parent
LINT_ONLY = "--lint"
TESTS = "tests"
REFERENCE = REPOSITORY.parent / "shared" / "reference"
NOT_SHOWN = (
    "not shown by this run: that the networks, losses, gradients, colour matches and file formats give the numbers "
    f"recorded from the official implementation, which are not at {REFERENCE}; their formulas are tested by hand"
)


def main(arguments: list[str]) -> int:
    """Runs the checks in order, all of them even if one fails; returns 0 only if every one passed."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    started = time.monotonic()
    try:
        python = str(prepare_tests().python)
        if LINT_ONLY not in arguments and find_browser() is None:
            install_browser()
    except HostError as error:
        print(f"\nruntests: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nruntests: stopped", file=sys.stderr)
        return 130
    results = {name: run_step(name, command) for name, command in steps(python, arguments)}
    report(results, time.monotonic() - started)
    return 0 if all(passed for passed, _ in results.values()) else 1


def steps(python: str, arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Returns (name, command) of each check."""
    checks = [
        ("lint", [python, "-m", "ruff", "check", "."]),
        ("format", [python, "-m", "ruff", "format", "--check", "."]),
        ("types", [python, "-m", "pyright", "--pythonpath", python]),
    ]
    if LINT_ONLY in arguments:
        return checks
    # Always with a path: pytest takes its root directory from it (see tests/pytest.ini).
    names_tests = any(Path(argument.split("::")[0]).exists() for argument in arguments)
    return [*checks, ("tests", [python, "-m", "pytest", *([] if names_tests else [TESTS]), *arguments])]


def run_step(name: str, command: list[str]) -> tuple[bool, float]:
    """Runs one check in the repository with its output on the terminal; returns (passed, seconds)."""
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=REPOSITORY, env=clean_environment()).returncode  # noqa: S603 - our own
    seconds = time.monotonic() - started
    print(f"== {name}: {'passed' if code == 0 else f'FAILED (exit code {code})'} in {seconds:.0f} s", flush=True)
    return code == 0, seconds


def report(results: dict[str, tuple[bool, float]], seconds: float) -> None:
    """Prints one line for each check and the total time."""
    print()
    for name, (passed, took) in results.items():
        print(f"{name:8} {'ok' if passed else 'FAILED':8} {took:6.0f} s")
    print(f"{'total':17} {seconds:6.0f} s", flush=True)
    if "tests" in results and not REFERENCE.is_dir():
        print(NOT_SHOWN, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
