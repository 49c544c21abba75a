"""Shows a run of ComfyUI on the terminal: which node works, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from .client import Event
from .workflow import title

BAR_WIDTH = 24
LINE_WIDTH = 78


class ProgressLine:
    """Takes a run's events; one line rewritten in place on a terminal, one line a node elsewhere."""

    def __init__(self, prompt: Mapping[str, Any]) -> None:
        self.prompt, self.started = prompt, time.monotonic()
        self.in_place = sys.stdout.isatty()

    def __call__(self, event: Event) -> None:
        if event.type == "executing" and event.data.get("node"):
            self._show(event.data["node"], None)
        elif event.type == "progress" and self.in_place:
            self._show(event.data["node"], event.data["value"] / max(1, event.data["max"]))
        elif event.type.startswith("execution_") and event.type not in ("execution_start", "execution_cached"):
            self._clear()

    def _show(self, node_id: str, share: float | None) -> None:
        bar = "" if share is None else f"[{'#' * round(share * BAR_WIDTH):<{BAR_WIDTH}}] {share:4.0%} "
        line = f"  {time.monotonic() - self.started:5.1f} s  {bar}{title(self.prompt, node_id)}"[:LINE_WIDTH]
        print(f"\r{line:<{LINE_WIDTH}}" if self.in_place else line, end="" if self.in_place else "\n", flush=True)

    def _clear(self) -> None:
        if self.in_place:
            print(f"\r{'':<{LINE_WIDTH}}\r", end="", flush=True)
