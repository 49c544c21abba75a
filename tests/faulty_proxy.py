"""A proxy in front of a real ComfyUI that fails on demand, for tests of what a batch does with bad servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

_HOP = ("host", "transfer-encoding", "content-length", "connection", "content-encoding")


class FaultyProxy:
    """Passes everything to `target`, as a context manager with an address, `url`.

    fault: None; "500": every request is answered so; "hang": a prompt is taken and never run; "close": a prompt's
    websocket is closed once it is taken; "text": every answer is a page. `key`: what requests must bring.
    prompts: how many were taken; most: the largest number of them at a time.
    """

    def __init__(self, target: str, *, fault: str | None = None, key: str | None = None, delay: float = 0.0) -> None:
        self.target, self.fault, self.key, self.delay = target, fault, key, delay
        self.prompts = self.most = self.running = self.refused = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._sockets: set[web.WebSocketResponse] = set()

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def start(self) -> None:
        """Opens the port; the same again after `stop`."""
        self._call(self._start())

    def stop(self) -> None:
        """Closes the port and every connection, as a server that is switched off."""
        self._call(self._stop())

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        port = int(self.url.rsplit(":", 1)[1]) if self.url else 0
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        for socket in list(self._sockets):
            transport = socket._req.transport if socket._req is not None else None
            if transport is not None:
                transport.abort()
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            self.refused += 1
            return web.Response(status=401, text="no key")
        if self.fault == "500":
            return web.Response(status=500, text="internal error")
        if self.fault == "text":
            return web.Response(text="<html>It works!</html>", content_type="text/html")
        if request.path == "/ws":
            return await self._bridge(request)
        if request.path == "/prompt" and request.method == "POST":
            return await self._prompt(request)
        return await self._forward(request, await request.read())

    async def _prompt(self, request: web.Request) -> web.StreamResponse:
        self.prompts += 1
        if self.fault == "hang":
            return web.json_response({"prompt_id": "never", "number": 1, "node_errors": {}})
        await asyncio.sleep(self.delay)
        answer = await self._forward(request, await request.read())
        if answer.status == 200:
            self.running += 1
            self.most = max(self.most, self.running)
        if self.fault == "close":
            for socket in list(self._sockets):
                await socket.close()
        return answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        url = f"{self.target}{request.rel_url}"
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)

    async def _bridge(self, request: web.Request) -> web.StreamResponse:
        here = web.WebSocketResponse()
        await here.prepare(request)
        self._sockets.add(here)
        try:
            async with self._session.ws_connect(f"{self.target}{request.rel_url}", max_msg_size=0) as there:
                gone = asyncio.ensure_future(_drain(here, there.close))
                async for message in there:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        self._count(message.data)
                        await here.send_str(message.data)
                    elif message.type is aiohttp.WSMsgType.BINARY:
                        await here.send_bytes(message.data)
                gone.cancel()
        except (aiohttp.ClientError, ConnectionError):
            pass
        finally:
            self._sockets.discard(here)
        return here

    def _count(self, text: str) -> None:
        if json.loads(text)["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            self.running -= 1


async def _drain(socket: web.WebSocketResponse, then: Callable[[], Awaitable[Any]]) -> None:
    async for _ in socket:
        pass
    await then()
