"""Runs one long command with its output in a log file and its progress on one line of the terminal."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import HostError

LAST_LINES = 15
STATUS_WIDTH = 100
QUIET_INTERVAL_SECONDS = 15.0  # without a terminal, one line of progress this often
_INHERITED_PYTHON = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")


def clean_environment(**extra: str) -> dict[str, str]:
    """Returns the process environment less what would leak this Python's modules into another, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if name not in _INHERITED_PYTHON}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **extra}


def run_logged(
    command: Sequence[str | Path],
    *,
    doing: str,
    advice: str,
    log: Path,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs `command`, its output in `log` and its latest line shown as progress.

    Raises HostError that names `doing`, the command, its last lines, the log and `advice`.
    """
    words = [str(word) for word in command]
    tail: deque[str] = deque(maxlen=LAST_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as log_file, _Status(doing) as status:
        try:
            process = subprocess.Popen(  # noqa: S603 - the commands are this package's own
                words,
                env=dict(env) if env is not None else clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise HostError(f"{doing} failed: cannot start {words[0]}: {error}\n{advice}") from error
        with process:
            for line in process.stdout or ():
                log_file.write(line)
                if text := line.strip():
                    tail.append(text)
                    status.show(text)
    if process.returncode != 0:
        raise HostError(
            f"{doing} failed (exit code {process.returncode}).\n"
            f"Command: {shlex.join(words)}\nIts last lines:\n  " + "\n  ".join(tail) + f"\n"
            f"The whole output: {log}\n{advice}"
        )


class _Status:
    """One line of progress: rewritten in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, doing: str) -> None:
        self.doing, self.started = doing, time.monotonic()
        self.in_place = sys.stdout.isatty()
        self.next_line_at = self.started + QUIET_INTERVAL_SECONDS

    def __enter__(self) -> _Status:
        print(f"{self.doing} ...", flush=True)
        return self

    def show(self, text: str) -> None:
        if text.startswith(("WARNING", "Looking in", "Requirement already")):
            return
        now = time.monotonic()
        line = f"  [{now - self.started:4.0f} s] {text}"[:STATUS_WIDTH]
        if self.in_place:
            print(f"\r{line:<{STATUS_WIDTH}}", end="", flush=True)
        elif now >= self.next_line_at:
            self.next_line_at = now + QUIET_INTERVAL_SECONDS
            print(line, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.in_place:
            print(f"\r{'':<{STATUS_WIDTH}}\r", end="")
        print(f"  {time.monotonic() - self.started:.0f} s", flush=True)
