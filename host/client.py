"""Talks to a running ComfyUI over its HTTP and websocket API."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HostError

HTTP_TIMEOUT_SECONDS = 60.0
RUN_TIMEOUT_SECONDS = 600.0
HISTORY_TIMEOUT_SECONDS = 5.0  # the history entry appears just after execution_success is sent
_FINAL_EVENTS = ("execution_success", "execution_error", "execution_interrupted")

Prompt = Mapping[str, Mapping[str, Any]]
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


class ComfyClient:
    """A client of the ComfyUI at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Loopback must not go through a proxy that the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get_bytes(self, path: str) -> bytes:
        """Returns the body of a GET request."""
        return self._open(urllib.request.Request(self.url + path))  # noqa: S310 - an http:// address

    def get_json(self, path: str) -> Any:
        """Returns the decoded JSON body of a GET request."""
        return json.loads(self.get_bytes(path))

    def post_json(self, path: str, payload: Mapping[str, Any]) -> Any:
        """Posts JSON and returns the decoded JSON answer, or None for an empty one."""
        request = urllib.request.Request(  # noqa: S310
            self.url + path, json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        body = self._open(request)
        return json.loads(body) if body else None

    def object_info(self) -> dict[str, Any]:
        """Returns ComfyUI's description of every node, by node id."""
        return self.get_json("/object_info")

    def upload(self, image: Path | bytes, name: str | None = None) -> str:
        """Uploads an image into ComfyUI's input folder; returns the name that a LoadImage node takes."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        file_name = name or (image.name if isinstance(image, Path) else f"{uuid.uuid4().hex}.png")
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
            f'filename="{_quoted(file_name)}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(  # noqa: S310
            self.url + "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        answer = json.loads(self._open(request))
        return "/".join(part for part in (answer["subfolder"], answer["name"]) if part)

    def view(self, image: Image) -> bytes:
        """Returns the file of one image of a run's outputs."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        return self.get_bytes("/view?" + urllib.parse.urlencode(query))

    def interrupt(self) -> None:
        """Asks ComfyUI to interrupt what it is running."""
        self.post_json("/interrupt", {})

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None = None,
        timeout: float = RUN_TIMEOUT_SECONDS,
        extra_data: Mapping[str, Any] | None = None,
    ) -> PromptRun:
        """Runs an API-format prompt to its end, following it on the websocket.

        Raises PromptRejected, ExecutionFailed, or HostError after `timeout` seconds.
        """
        return asyncio.run(self._run(prompt, on_event, timeout, extra_data or {}))

    async def _run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None,
        timeout: float,
        extra_data: Mapping[str, Any],
    ) -> PromptRun:
        import aiohttp

        client_id, started = uuid.uuid4().hex, time.monotonic()
        async with aiohttp.ClientSession() as session:
            address = f"{self.url}/ws?clientId={client_id}"
            async with session.ws_connect(address, max_msg_size=0) as socket:
                payload = {"prompt": prompt, "client_id": client_id, "extra_data": extra_data}
                async with session.post(self.url + "/prompt", json=payload) as response:
                    body = await response.json()
                    if response.status != 200:
                        raise PromptRejected(body)
                prompt_id = body["prompt_id"]
                try:
                    events = await asyncio.wait_for(_follow(socket, prompt_id, on_event), timeout)
                except asyncio.TimeoutError as error:
                    raise HostError(f"ComfyUI did not finish within {timeout:.0f} s.") from error
        if events[-1].type != "execution_success":
            raise ExecutionFailed(events[-1].data)
        seconds = time.monotonic() - started
        return PromptRun(prompt_id, self._outputs(prompt_id), tuple(events), seconds)

    def _outputs(self, prompt_id: str) -> Mapping[str, Mapping[str, Any]]:
        give_up_at = time.monotonic() + HISTORY_TIMEOUT_SECONDS
        while time.monotonic() < give_up_at:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry["outputs"]
            time.sleep(0.02)
        raise HostError(f"ComfyUI has no history of prompt {prompt_id}, though it reported success.")

    def _open(self, request: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=HTTP_TIMEOUT_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise HostError(f"{request.full_url} answered {error.code}: {detail}") from error


async def _follow(
    socket: Any,
    prompt_id: str,
    on_event: Callable[[Event], None] | None,
) -> list[Event]:
    """Returns the events of a websocket up to the final one of `prompt_id`."""
    events: list[Event] = []
    async for message in socket:
        event = _event(message.data)
        events.append(event)
        if on_event is not None:
            on_event(event)
        if event.type in _FINAL_EVENTS and event.data.get("prompt_id") == prompt_id:
            return events
    raise HostError("ComfyUI closed the connection before the run ended.")


def _event(data: str | bytes) -> Event:
    if not isinstance(data, str):
        return Event("binary", {})
    content = json.loads(data)
    return Event(content["type"], content.get("data") or {})


def _quoted(file_name: str) -> str:
    """Returns a file name as browsers write it in a multipart header."""
    return file_name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _rejection_text(body: Mapping[str, Any]) -> str:
    """Returns one line for each thing that ComfyUI's validation found wrong."""
    lines = [
        f"node {node} ({found.get('class_type')}): {error.get('message')}: {error.get('details')}"
        for node, found in (body.get("node_errors") or {}).items()
        for error in found.get("errors", ())
    ]
    return "; ".join(lines) or str((body.get("error") or {}).get("message") or body)
