"""Starts a real ComfyUI with this pack in a temporary base directory, and stops it by its own process handle."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .base_folders import TemporaryBase
from .client import ComfyClient
from .commands import clean_environment
from .errors import HostError, ServerFault
from .prompt_run import Image

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "tadsr"  # the folder name in custom_nodes, and so in addresses and templates
START_TIMEOUT_SECONDS = 300.0
STOP_TIMEOUT_SECONDS = 15.0
POLL_SECONDS = 0.1
LOG_TAIL_CHARACTERS = 4000
_FOLDERS = ("custom_nodes", "input", "output", "user", "models")
_COPY_MARKER = ".copied-by-tadsr"
_NOT_COPIED = (".git", "__pycache__", ".venv", "venv", "tests", ".ruff_cache", ".pytest_cache")


class ComfyServer(ComfyClient):
    """A ComfyUI process and its client, as a context manager: ready on entry, gone on exit.

    `python` is the interpreter with ComfyUI's packages. `base` (default: a temporary directory, removed at
    the end) receives models, input, output, user and custom_nodes; the pack is linked into the last.
    `cpu=None` asks torch for an accelerator and uses the CPU only where there is none.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path | str = sys.executable,
        *,
        base: Path | None = None,
        cpu: bool | None = True,
        flags: Sequence[str] = (),
        start_timeout: float = START_TIMEOUT_SECONDS,
    ) -> None:
        super().__init__(f"http://127.0.0.1:{_free_port()}")
        self.comfyui, self.python = Path(comfyui), str(python)
        self.cpu, self.flags, self.start_timeout = cpu, tuple(flags), start_timeout
        self._temporary = TemporaryBase() if base is None else None
        self.base = self._temporary.path if self._temporary else Path(base or "").resolve()
        self.log_path = self.base / "server.log"
        self.startup_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def log(self) -> str:
        """Returns everything that ComfyUI has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Returns whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def discard(self, image: Image) -> None:
        """Removes a file that a run left."""
        folder = self.base / image["type"]
        (folder / image["subfolder"] / image["filename"]).unlink(missing_ok=True)

    def __enter__(self) -> ComfyServer:
        for folder in _FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for sample in (self.comfyui / "input").glob("*.png"):  # a fresh ComfyUI has one, and workflows name it
            shutil.copy(sample, self.base / "input")
        link_pack(self.base / "custom_nodes" / PACK_NAME)
        started = time.monotonic()
        with self.log_path.open("wb") as log:
            # Its own session or group: a Ctrl-C in the terminal reaches only this process, which then stops it.
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._command(),
                cwd=self.base,
                env=clean_environment(NO_COLOR="1"),
                stdin=subprocess.PIPE,  # closed when this process dies, which ends the server
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready(started)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the server: politely first, so that it empties its temp folder; then by force."""
        process = self._process
        if process is not None and process.poll() is None:
            if os.name == "posix":
                process.send_signal(signal.SIGINT)
            else:
                process.terminate()
            try:
                process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process is not None and process.stdin is not None:
            process.stdin.close()
        unlink_pack(self.base / "custom_nodes" / PACK_NAME)
        if self._temporary is not None:
            self._temporary.close()

    def _command(self) -> list[str]:
        launcher = Path(__file__).with_name("launcher.py")
        cpu = not has_accelerator(self.python) if self.cpu is None else self.cpu
        return [
            *(self.python, str(launcher), str(self.comfyui)),
            *(["--cpu"] if cpu else []),
            *("--base-directory", str(self.base), "--listen", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1]),
            # No address outside this machine is asked for, and the database does not move with the base.
            *("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"),
            *self.flags,
        ]

    def _wait_until_ready(self, started: float) -> None:
        while True:
            if not self.is_running():
                raise HostError(f"ComfyUI ended while starting. Its last lines:\n{self._log_tail()}")
            try:
                self.get_json("/system_stats")
                return
            except ServerFault:
                if time.monotonic() - started > self.start_timeout:
                    raise HostError(
                        f"ComfyUI was not ready within {self.start_timeout:.0f} s. Its last lines:\n{self._log_tail()}"
                    ) from None
                time.sleep(POLL_SECONDS)

    def _log_tail(self) -> str:
        return self.log()[-LOG_TAIL_CHARACTERS:]


def link_pack(target: Path, pack: Path = PACK) -> None:
    """Puts the pack at `target`: a link, or a copy where links are not allowed (Windows without the right).

    Replaces a link or a copy that an earlier run left. Raises HostError for anything else that is there.
    """
    unlink_pack(target)
    if target.exists():
        raise HostError(f"{target} is in the way: it was not put there by this program. Move it away.")
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        (target / _COPY_MARKER).touch()


def unlink_pack(target: Path) -> None:
    """Removes what `link_pack` put at `target`; never follows a link into this repository."""
    if target.is_symlink():
        target.unlink()
    elif (target / _COPY_MARKER).is_file():
        shutil.rmtree(target)


def has_accelerator(python: str) -> bool:
    """Returns whether torch in another interpreter sees a GPU that ComfyUI can use."""
    question = (
        "import sys; from importlib.metadata import version; version('torch').endswith('+cpu') and sys.exit(1); "
        "import torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available() "
        "or (hasattr(torch, 'xpu') and torch.xpu.is_available())))"
    )
    command = [python, "-c", question]
    return subprocess.run(command, env=clean_environment(), capture_output=True).returncode == 0  # noqa: S603


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
