"""One picture through a ComfyUI: uploaded, run, downloaded, and the server's folders left as they were."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .carrier import SAVE_DEEP, Carrier
from .client import RUN_TIMEOUT_SECONDS, ComfyClient
from .errors import HostError
from .pictures import Picture, uploads
from .prompt_run import Event, ExecutionFailed, Image, PromptRun

EventFilter = Callable[[Event], None]


@dataclass(frozen=True)
class Transfer:
    """How pictures go through `client`: by which workflow, under which names (unique to one picture in flight)."""

    client: ComfyClient
    carrier: Carrier
    slot: str
    timeout: float = RUN_TIMEOUT_SECONDS
    deep: bool = True  # the server can write 16 bits

    def run(
        self,
        picture: Picture,
        *,
        deep_result: bool,
        on_event: EventFilter | None = None,
        stop: threading.Event | None = None,
    ) -> tuple[bytes, PromptRun]:
        """Returns the PNG file that ComfyUI made of the picture, and the finished run.

        Raises what `ComfyClient.run` does, and HostError when the workflow saved no picture.
        """
        files = [_temporary(f"{self.slot}-{number}.png") for number in range(2 if picture.deep else 1)]
        try:
            names = [
                self.client.upload(content, file["filename"], folder="temp", overwrite=True)
                for content, file in zip(uploads(picture), files, strict=True)
            ]
            deep = deep_result and picture.deep and self.deep
            prompt = self.carrier.filled(names, alpha=picture.has_alpha, deep_result=deep)
            run = self.client.run(prompt, on_event, self.timeout, stop=stop)
            return self._download(run), run
        except ExecutionFailed as error:
            self._forget(str(error.details.get("prompt_id")))
            raise
        finally:
            self._clear(files)

    def _download(self, run: PromptRun) -> bytes:
        images = run.images(self.carrier.save)
        try:
            if len(images) != 1:
                raise HostError(f"the workflow saved {len(images)} pictures of one; accepted is one")
            return self.client.view(images[0])
        finally:
            self._clear(images)
            self._forget(run.prompt_id)

    def _forget(self, prompt_id: str) -> None:
        with contextlib.suppress(HostError):
            self.client.forget(prompt_id)

    def _clear(self, files: Iterable[Image]) -> None:
        for file in files:
            with contextlib.suppress(HostError, OSError):
                self.client.discard(file)


def _temporary(name: str) -> Image:
    return {"filename": name, "subfolder": "", "type": "temp"}


def can_write_16_bits(client: ComfyClient) -> bool:
    """Returns whether the server has the node that writes them (ComfyUI 0.30 has it, 0.24 has not)."""
    return SAVE_DEEP in client.get_json(f"/object_info/{SAVE_DEEP}")
