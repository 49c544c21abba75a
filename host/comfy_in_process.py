"""Makes a ComfyUI tree importable in this process, with this pack loaded as ComfyUI loads it.

For tests and benchmarks. It loads ComfyUI's modules by name, as there is no ComfyUI to import when it is read.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .server import PACK, PACK_NAME, link_pack

FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models")
MODULES = {  # of nodes/: the one place where tests and benchmarks name them
    "base": "models.base",
    "batch": "running.batch",
    "compat": "compat",
    "folders": "models.folders",
    "forecast": "running.forecast",
    "student": "models.student",
    "tagger": "models.tagger",
    "kept": "running.kept",
    "memory": "running.memory",
    "pictures": "running.pictures",
    "plan": "running.plan",
    "progress": "running.progress",
    "run": "running.run",
    "stages": "running.stages",
}
NO_CACHE = {"lru": 0, "ram": 0, "ram_inactive": 0}


class PromptError(AssertionError):
    """A prompt was refused by validation or failed in a node; `message` is ComfyUI's own text."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class _EventRecorder:
    """Stands where the executor expects the HTTP server: keeps what would have been sent to the page."""

    client_id = "in-process"
    last_node_id: str | None = None
    last_prompt_id: str | None = None

    def __init__(self) -> None:
        self.sockets_metadata: dict[str, Any] = {}
        self.events: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: object, sid: str | None = None) -> None:
        self.events.append((event, data))


@dataclass(frozen=True)
class InProcessComfy:
    """ComfyUI's modules in this process (`import comfy...` works) and the pack, loaded by path."""

    pack: ModuleType
    base: Path
    loop: asyncio.AbstractEventLoop

    def module(self, name: str) -> ModuleType:
        """Returns a module of `nodes/` as its nodes see it, by the name that MODULES gives it."""
        return importlib.import_module(f".nodes.{MODULES[name]}", self.pack.__name__)

    def node(self, node_id: str) -> Any:
        """Returns the class of a registered node, of the pack or of ComfyUI."""
        return sys.modules["nodes"].NODE_CLASS_MAPPINGS[node_id]

    def load_core_nodes(self, file_name: str) -> None:
        """Registers the nodes of one file of ComfyUI's `comfy_extras`, such as `nodes_custom_sampler.py`."""
        nodes = sys.modules["nodes"]
        path = Path(nodes.__file__ or "").with_name("comfy_extras") / file_name
        loaded = self.loop.run_until_complete(nodes.load_custom_node(str(path), module_parent="comfy_extras"))
        assert loaded, f"ComfyUI could not load {path}"

    def run(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Runs an API-format prompt through ComfyUI's own validation and executor; returns outputs by node id.

        Raises PromptError where ComfyUI would show an error. Nothing is cached from run to run.
        """
        execution = importlib.import_module("execution")
        prompt_id = uuid.uuid4().hex
        valid = self.loop.run_until_complete(execution.validate_prompt(prompt_id, prompt, None))
        if not valid[0]:
            raise PromptError(f"{valid[1]} {valid[3]}")
        recorder = _EventRecorder()
        executor = execution.PromptExecutor(recorder, cache_type=execution.CacheType.NONE, cache_args=dict(NO_CACHE))
        executor.execute(prompt, prompt_id, {}, valid[2])
        if not executor.success:
            errors = [data for event, data in executor.status_messages if event == "execution_error"]
            raise PromptError(errors[0]["exception_message"] if errors else str(recorder.events))
        return executor.history_result["outputs"]


def load(comfyui: Path, base: Path, *, cpu: bool = True, pack: Path = PACK) -> InProcessComfy:
    """Imports ComfyUI from `comfyui`, with `base` for its folders, and loads `pack`; on the CPU, or on a GPU.

    Works once a process. The pack gets the mangled module name that ComfyUI gives every custom node.
    """
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    # First on the path: ComfyUI's top-level module `nodes` must win over this repository's folder.
    sys.path.insert(0, str(comfyui))
    _set_arguments(base, cpu)
    # As main.py does: up to 0.20, `nodes` puts comfy/ first on the path, with another module of that name.
    importlib.import_module("utils.extra_config")
    nodes, server = importlib.import_module("nodes"), importlib.import_module("server")
    assert Path(nodes.__file__ or "").parent == comfyui, f"`nodes` is {nodes.__file__}, not ComfyUI's"
    loop = asyncio.new_event_loop()
    server.PromptServer(loop)  # opens no port; nodes and extensions look for its instance
    loop.run_until_complete(nodes.init_public_apis())
    target = base / "custom_nodes" / PACK_NAME
    link_pack(target, pack)
    loaded = loop.run_until_complete(nodes.load_custom_node(str(target), module_parent="custom_nodes"))
    assert loaded, "ComfyUI could not load this pack: see the error that it logged above"
    return InProcessComfy(sys.modules[str(target).replace(".", "_x_")], base, loop)


def _set_arguments(base: Path, cpu: bool) -> None:
    """Sets what ComfyUI takes from its command line; it reads these when its modules are first imported."""
    importlib.import_module("comfy.options")  # parsing stays off, so that pytest's arguments are left alone
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = cpu
    args.base_directory = str(base)
    args.disable_api_nodes = True
    args.database_url = "sqlite:///:memory:"
