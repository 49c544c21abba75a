"""Talks to a running ComfyUI over its HTTP and websocket API."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import BrokeOff, HostError, ServerFault, Stopped
from .prompt_run import Event, ExecutionFailed, Image, PromptRejected, PromptRun, WatchedPrompt

HTTP_TIMEOUT_SECONDS = 60.0
RUN_TIMEOUT_SECONDS = 600.0
HEARTBEAT_SECONDS = 60.0  # a websocket whose other end has gone is noticed after this and half of it
WATCH_SECONDS = 0.5
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HISTORY_TIMEOUT_SECONDS = 5.0  # the history entry appears just after execution_success is sent
BAD_REQUEST = 400

Prompt = Mapping[str, Mapping[str, Any]]


class ComfyClient:
    """A client of the ComfyUI at `url`; `key` goes to it as a bearer token (for a proxy in front of it)."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Loopback must not go through a proxy that the environment names.
        self.local = urllib.parse.urlsplit(self.url).hostname in LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if self.local else []
        self._opener = urllib.request.build_opener(*proxies)

    def get_bytes(self, path: str) -> bytes:
        """Returns the body of a GET request."""
        return self._open(urllib.request.Request(self.url + path))  # noqa: S310 - an http:// address

    def get_json(self, path: str) -> Any:
        """Returns the decoded JSON body of a GET request."""
        return self._decoded(path, self.get_bytes(path))

    def post_json(self, path: str, payload: Mapping[str, Any]) -> Any:
        """Posts JSON and returns the decoded JSON answer, or None for an empty one."""
        request = urllib.request.Request(  # noqa: S310
            self.url + path, json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        body = self._open(request)
        return self._decoded(path, body) if body else None

    def object_info(self) -> dict[str, Any]:
        """Returns ComfyUI's description of every node, by node id."""
        return self.get_json("/object_info")

    def upload(
        self, image: Path | bytes, name: str | None = None, *, folder: str = "input", overwrite: bool = False
    ) -> str:
        """Uploads an image into ComfyUI's input (or temp) folder; returns the name that a LoadImage node takes."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        file_name = name or (image.name if isinstance(image, Path) else f"{uuid.uuid4().hex}.png")
        fields = {"type": folder, **({"overwrite": "true"} if overwrite else {})}
        answer = self._post_form(fields, file_name, content)
        path = "/".join(part for part in (answer["subfolder"], answer["name"]) if part)
        return path if folder == "input" else f"{path} [{folder}]"

    def discard(self, image: Image) -> None:
        """Empties a file that a run left on the server: the API can overwrite files, but not delete them."""
        fields = {"type": image["type"], "subfolder": image["subfolder"], "overwrite": "true"}
        self._post_form(fields, image["filename"], b"")

    def _post_form(self, fields: Mapping[str, str], file_name: str, content: bytes) -> Any:
        boundary = uuid.uuid4().hex
        parts = [f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()]
        parts.append(
            f'Content-Disposition: form-data; name="image"; filename="{_quoted(file_name)}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        head = "".join(f"--{boundary}\r\n{part}" for part in parts)
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(  # noqa: S310
            self.url + "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        return self._decoded("/upload/image", self._open(request))

    def view(self, image: Image) -> bytes:
        """Returns the file of one image of a run's outputs."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        return self.get_bytes("/view?" + urllib.parse.urlencode(query))

    def interrupt(self) -> None:
        """Asks ComfyUI to interrupt what it is running."""
        self.post_json("/interrupt", {})

    def cancel(self, prompt_id: str) -> None:
        """Takes a prompt out of the queue, or stops it if it is running; other people's prompts go on."""
        self.post_json("/queue", {"delete": [prompt_id]})
        self.post_json("/interrupt", {"prompt_id": prompt_id})

    def forget(self, prompt_id: str) -> None:
        """Removes a finished prompt from the server's history."""
        self.post_json("/history", {"delete": [prompt_id]})

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None = None,
        timeout: float = RUN_TIMEOUT_SECONDS,
        extra_data: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> PromptRun:
        """Runs an API-format prompt to its end, following it on the websocket.

        Raises PromptRejected, ExecutionFailed, ServerFault when the server breaks off or nothing has happened to the
        prompt for `timeout` seconds while it ran, and Stopped once `stop` is set. What is given up is cancelled.
        """
        return asyncio.run(self._run(prompt, on_event, timeout, extra_data or {}, stop or threading.Event()))

    async def _run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None,
        timeout: float,
        extra_data: Mapping[str, Any],
        stop: threading.Event,
    ) -> PromptRun:
        import aiohttp

        watched: WatchedPrompt | None = None
        client_id, started = uuid.uuid4().hex, time.monotonic()
        options = {
            "headers": self.headers,
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=HTTP_TIMEOUT_SECONDS),
        }
        try:
            async with (
                aiohttp.ClientSession(**options, trust_env=not self.local) as session,
                session.ws_connect(
                    f"{self.url}/ws?clientId={client_id}", max_msg_size=0, heartbeat=HEARTBEAT_SECONDS
                ) as socket,
            ):
                payload = {"prompt": prompt, "client_id": client_id, "extra_data": extra_data}
                prompt_id = await self._submit(session, payload)
                watched = WatchedPrompt(socket, prompt_id, on_event)
                events = await self._watch(watched, timeout, stop)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            kind = ServerFault if watched is None else BrokeOff
            raise kind(f"{self.url} broke off: {str(error) or type(error).__name__}") from error
        if events[-1].type != "execution_success":
            raise ExecutionFailed(events[-1].data)
        seconds = time.monotonic() - started
        return PromptRun(prompt_id, self._outputs(prompt_id), tuple(events), seconds)

    async def _submit(self, session: Any, payload: Mapping[str, Any]) -> str:
        async with session.post(self.url + "/prompt", json=payload) as response:
            content = await response.read()
            if response.status not in (200, 400):
                raise ServerFault(
                    f"{self.url}/prompt answered {response.status}: {content[:500].decode(errors='replace')}"
                )
            body = self._decoded("/prompt", content)
            if response.status == 400:
                raise PromptRejected(body)
            return body["prompt_id"]

    async def _watch(self, watched: WatchedPrompt, timeout: float, stop: threading.Event) -> list[Event]:
        following = asyncio.ensure_future(watched.follow())
        try:
            while not following.done():
                await asyncio.wait({following}, timeout=WATCH_SECONDS)
                if following.done():
                    break
                if stop.is_set():
                    raise Stopped("stopped")
                if watched.quiet_seconds() > timeout and not await asyncio.to_thread(self._is_waiting, watched):
                    raise BrokeOff(f"{self.url}: nothing happened to the prompt for {timeout:.0f} s")
            return following.result()
        except BaseException:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            with contextlib.suppress(HostError):
                await asyncio.to_thread(self.cancel, watched.prompt_id)
            raise

    def _is_waiting(self, watched: WatchedPrompt) -> bool:
        """Returns whether the prompt still stands in the queue, behind other people's."""
        pending = self.get_json("/queue")["queue_pending"]
        waiting = any(entry[1] == watched.prompt_id for entry in pending)
        if waiting:
            watched.last_event = time.monotonic()
        return waiting

    def _outputs(self, prompt_id: str) -> Mapping[str, Mapping[str, Any]]:
        give_up_at = time.monotonic() + HISTORY_TIMEOUT_SECONDS
        while time.monotonic() < give_up_at:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry["outputs"]
            time.sleep(0.02)
        raise ServerFault(f"{self.url} has no history of prompt {prompt_id}, though it reported success.")

    def _open(self, request: urllib.request.Request) -> bytes:
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # the key is for this server alone
        try:
            with self._opener.open(request, timeout=HTTP_TIMEOUT_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            kind = HostError if error.code == BAD_REQUEST else ServerFault
            raise kind(f"{request.full_url} answered {error.code}: {detail}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerFault(f"{self.url} does not answer: {reason or type(error).__name__}") from error

    def _decoded(self, path: str, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError as error:
            raise ServerFault(
                f"{self.url}{path} answered {body[:60]!r}, which is not JSON: is it a ComfyUI?"
            ) from error


def _quoted(file_name: str) -> str:
    """Returns a file name as browsers write it in a multipart header."""
    return file_name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
