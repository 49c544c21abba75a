"""Kills quickstart.py at many moments: `python -m benchmarks.kills [--count N] [--span SECONDS] [--seed S]`.

Each time a SIGKILL, at a moment drawn evenly from the span after "Starting ComfyUI ...": while ComfyUI starts, is
ready, upscales, ends. No server may outlive its starter for more than 30 seconds, and the next start must remove the
folder with the user's picture. A last start is left alone and must give its result. Prints a table; exits with 1 where
anything was left. Linux and macOS; minutes. Equal seeds give equal moments.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run by path, too

from host.base_folders import PREFIX  # noqa: E402

PATIENCE_SECONDS = 30.0  # for a server to notice that its starter is gone, and to end
POLL_SECONDS = 0.1
FIRST_SECONDS = 0.3  # after which a start has cleared what others left
LIST = ("ps", "-eo", "stat,args")
PHASES = ("starting", "ready", "upscaling", "done")
LINES = ("Starting ComfyUI", "  ready after", "Upscaling", "  done in")  # what quickstart.py prints, in this order


def start(folder: Path) -> subprocess.Popen[str]:
    """Starts quickstart.py with its temporary folders in `folder`; returns it once it starts ComfyUI."""
    command = [sys.executable, str(REPOSITORY / "quickstart.py"), "--output", str(folder / "result.png")]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)  # noqa: S603
    log.close()
    wait_until(lambda: LINES[0] in printed(folder) or process.poll() is not None, 600)
    return process


def printed(folder: Path) -> str:
    """Returns what the last start has printed."""
    return (folder / "log.txt").read_text()


def phase(folder: Path) -> str:
    """Returns how far the last start has come."""
    return PHASES[max(index for index, line in enumerate(LINES) if line in printed(folder))]


def kill(folder: Path, wait: float) -> tuple[str, float | None, list[Path]]:
    """Kills one start after so many seconds.

    Returns how far it was, after how many seconds its server was gone (None: never), and the folders it left.
    """
    process = start(folder)
    time.sleep(wait)
    reached = phase(folder)
    process.kill()
    process.wait()
    killed = time.monotonic()
    gone = wait_until(lambda: not servers(folder), PATIENCE_SECONDS)
    return reached, time.monotonic() - killed if gone else None, bases(folder)


def servers(folder: Path) -> list[str]:
    """Returns the command lines of living programs that name the folder's base directories."""
    listed = subprocess.run(LIST, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return [line for line in listed.splitlines() if f"{folder / PREFIX}" in line and not line.startswith("Z")]


def bases(folder: Path) -> list[Path]:
    """Returns the base directories in the folder."""
    return [path for path in folder.glob(f"{PREFIX}*") if path.is_dir()]


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Returns whether a function became true in time."""
    give_up_at = time.monotonic() + seconds
    while not true():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(POLL_SECONDS)
    return True


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--span", type=float, default=12.0, help="seconds after the start in which they lie")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random = Random(options.seed)  # noqa: S311 - not for secrets
    left_servers, left_folders, earlier = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="tadsr-kills-") as name:
        folder = Path(name).resolve()
        for number in range(options.count):
            wait = random.uniform(FIRST_SECONDS, options.span)
            reached, seconds, found = kill(folder, wait)
            left_servers += seconds is None
            kept = [path for path in earlier if path in found]  # the next start is to have removed them
            left_folders += len(kept)
            earlier = found
            told = "server still there" if seconds is None else f"server gone after {seconds:.1f} s"
            print(f"{number + 1:3}. after {wait:4.1f} s ({reached}): {told}; {len(kept)} old folders", flush=True)
        process = start(folder)
        whole = process.wait(600) == 0 and (folder / "result.png").is_file()
        left_folders += len(bases(folder))
        left_servers += len(servers(folder))
    print(f"{options.count} kills: {left_servers} servers and {left_folders} folders left after the next start")
    print(f"The start after them {'gave its result' if whole else f'failed:{chr(10)}{printed(folder)}'}.")
    return 0 if whole and not left_servers and not left_folders else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
