"""One prompt that ComfyUI runs: its events on the websocket, how it ends, and what it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import BrokeOff, HostError

_FINAL_EVENTS = ("execution_success", "execution_error", "execution_interrupted")

Image = Mapping[str, str]


class PromptRejected(HostError):
    """ComfyUI refused a prompt before running it (HTTP 400); `node_errors` is its own account."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.node_errors: Mapping[str, Any] = body.get("node_errors") or {}
        super().__init__(f"ComfyUI refused the workflow: {_rejection_text(body)}")


class ExecutionFailed(HostError):
    """A node raised an error, or the run was interrupted; `details` is ComfyUI's event."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.details = details
        self.message = str(details.get("exception_message", "interrupted")).strip()
        super().__init__(f"Node {details.get('node_id')} ({details.get('node_type')}) failed: {self.message}")


@dataclass(frozen=True)
class Event:
    """One websocket message: ComfyUI's type and data; previews have type "binary" and no data."""

    type: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class PromptRun:
    """A finished run: the outputs by node id, every event seen, and the time from sending to success."""

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    events: tuple[Event, ...]
    seconds: float

    def images(self, node_id: str | None = None) -> list[Image]:
        """Returns the images that the run saved, of one node or of all, as `ComfyClient.view` takes them."""
        return [
            image
            for node, output in self.outputs.items()
            if node_id in (None, node)
            for image in output.get("images", ())
        ]


class WatchedPrompt:
    """A prompt on its websocket, and when something last happened to it."""

    def __init__(self, socket: Any, prompt_id: str, on_event: Callable[[Event], None] | None) -> None:
        self.socket, self.prompt_id, self.on_event = socket, prompt_id, on_event
        self.last_event = time.monotonic()

    def quiet_seconds(self) -> float:
        """Returns the seconds since the server last said something about the prompt."""
        return time.monotonic() - self.last_event

    async def follow(self) -> list[Event]:
        """Returns the events of the websocket up to the final one of the prompt."""
        events: list[Event] = []
        async for message in self.socket:
            if not isinstance(message.data, str | bytes):
                break
            event = _event(message.data)
            events.append(event)
            if event.type == "binary" or event.data.get("prompt_id") == self.prompt_id:
                self.last_event = time.monotonic()
            if self.on_event is not None:
                self.on_event(event)
            if event.type in _FINAL_EVENTS and event.data.get("prompt_id") == self.prompt_id:
                return events
        raise BrokeOff("ComfyUI closed the connection before the run ended.")


def _event(data: str | bytes) -> Event:
    if not isinstance(data, str):
        return Event("binary", {})
    content = json.loads(data)
    return Event(content["type"], content.get("data") or {})


def _rejection_text(body: Mapping[str, Any]) -> str:
    """Returns one line for each thing that ComfyUI's validation found wrong."""
    lines = [
        f"node {node} ({found.get('class_type')}): {error.get('message')}: {error.get('details')}"
        for node, found in (body.get("node_errors") or {}).items()
        for error in found.get("errors", ())
    ]
    return "; ".join(lines) or str((body.get("error") or {}).get("message") or body)
