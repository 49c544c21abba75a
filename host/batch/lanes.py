"""The servers of a batch: one of its own, or any number of others; how each is checked, used and left."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..carrier import Carrier, check_inputs
from ..client import ComfyClient
from ..comfyui import OLDEST_VERSION, as_numbers
from ..errors import HostError, Unusable
from ..prompt_run import PromptRejected
from ..server import ComfyServer
from ..transfer import Transfer, can_write_16_bits
from .making import Made, Order, make

IN_FLIGHT = 2  # one runs while the next is sent and the last is fetched
DEFAULT_TIMEOUT_SECONDS = 600.0


class Lane(Protocol):
    """A place where pictures are made, `slots` at a time."""

    name: str
    slots: int

    def open(self) -> None:
        """Makes the lane ready; raises ServerFault if it may be later, HostError if it never will be."""
        ...

    def make(self, order: Order, slot: int, stop: threading.Event) -> Made:
        """Makes one picture; `slot` is free of others until this returns."""
        ...

    def close(self) -> None:
        """Frees what the lane holds."""
        ...


class ServerLane:
    """A ComfyUI that somebody runs, at an address."""

    def __init__(
        self, client: ComfyClient, carrier: Carrier, *, slots: int = IN_FLIGHT, timeout: float = DEFAULT_TIMEOUT_SECONDS
    ) -> None:
        self.name, self.slots = client.url, slots
        self.client, self.carrier, self.timeout = client, carrier, timeout
        self._prefix = f"tadsr-batch-{uuid.uuid4().hex[:12]}"
        self._deep = False

    def open(self) -> None:
        check_server(self.client, self.carrier)
        self._deep = can_write_16_bits(self.client)

    def make(self, order: Order, slot: int, stop: threading.Event) -> Made:
        transfer = Transfer(self.client, self.carrier, f"{self._prefix}-{slot}", self.timeout, self._deep)
        try:
            return make(order, transfer, stop)
        except PromptRejected as error:
            if self.carrier.load in error.node_errors:
                raise
            raise Unusable(f"{self.name}: {error}") from error  # it would refuse every picture

    def close(self) -> None:
        pass


class OwnLane:
    """A ComfyUI of our own, started when it is first needed and again if it dies."""

    def __init__(
        self,
        comfyui: Path,
        carrier: Carrier,
        *,
        models: Path | None = None,
        slots: int = IN_FLIGHT,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        flags: Sequence[str] = (),
        cpu: bool | None = None,
        python: Path | str = sys.executable,
    ) -> None:
        self.name, self.slots = "own", slots
        self.comfyui, self.carrier, self.models, self.timeout = comfyui, carrier, models, timeout
        self.flags, self.cpu, self.python = tuple(flags), cpu, python
        self._server: ComfyServer | None = None
        self._lane: ServerLane | None = None

    def open(self) -> None:
        if self._server is None or not self._server.is_running():
            self.close()
            server = ComfyServer(self.comfyui, self.python, cpu=self.cpu, flags=self.flags)
            if self.models is not None:
                server.flags += ("--extra-model-paths-config", str(write_model_paths(server.base, self.models)))
            server.__enter__()
            self._server = server
        self._lane = ServerLane(self._server, self.carrier, slots=self.slots, timeout=self.timeout)
        self._lane.open()

    def make(self, order: Order, slot: int, stop: threading.Event) -> Made:
        assert self._lane is not None, "open comes first"
        return self._lane.make(order, slot, stop)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def write_model_paths(base: Path, models: Path) -> Path:
    """Writes a file that lets ComfyUI look for models in the folders of `models` too; returns its path."""
    if not models.is_dir():
        raise HostError(f"there is no folder of models {models}")
    folders = {folder.name: str(folder.resolve()) for folder in sorted(models.iterdir()) if folder.is_dir()}
    file = base / "model-paths.yaml"
    file.write_text(json.dumps({"tadsr_batch": folders}), encoding="utf-8")  # JSON is YAML
    return file


def check_server(client: ComfyClient, carrier: Carrier) -> None:
    """Raises ServerFault if the server does not answer as a ComfyUI, and HostError if it cannot run the workflow."""
    stats = client.get_json("/system_stats")
    version = stats.get("system", {}).get("comfyui_version") if isinstance(stats, dict) else None
    if not isinstance(version, str):
        raise HostError(f"{client.url} answers, but is not a ComfyUI")
    if as_numbers(version) < as_numbers(OLDEST_VERSION):
        raise HostError(f"{client.url} is ComfyUI {version}; {OLDEST_VERSION} or newer is needed")
    known = client.object_info()
    missing = sorted(carrier.classes() - known.keys())
    if missing:
        ours = any(name.startswith("TADSR") for name in missing)
        advice = "; is this pack in its custom_nodes, and was it restarted?" if ours else ""
        raise HostError(f"{client.url} has no node {', '.join(missing)}{advice}")
    check_inputs(carrier.prompt, known)


def read_key(file: Path) -> str:
    """Returns the API key in a file; raises HostError for none, or for more than one line."""
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"the API key file {file} cannot be read: {error}") from error
    if len(lines) != 1:
        raise HostError(f"the API key file {file} holds {len(lines)} words; accepted is one key")
    return lines[0]
