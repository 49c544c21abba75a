"""Upscales folders of pictures through the ComfyUI API: the function behind batch.py."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..client import ComfyClient
from ..errors import HostError
from ..interpreter import chosen_comfyui
from ..server import PACK
from .board import Board, Task
from .inputs import Failure, Inputs, Item, find_inputs
from .lanes import Lane, OwnLane, ServerLane
from .making import Made, Order
from .manifest import Entry, Manifest, file_digest, settings_digest
from .options import BatchOptions
from .serving import DISK_ERRORS, Serving

LOADER = "TADSRModelLoader"


@dataclass
class BatchReport:
    """What became of a batch: pictures made now, pictures that were there, failures, and why it ended early, if so."""

    done: int = 0
    there: int = 0
    failures: list[Failure] = field(default_factory=list)
    ended: str | None = None
    left: int = 0
    seconds: float = 0.0


class Watcher:
    """Is told how a batch goes; this one keeps silent."""

    def begins(self, total: int, there: int, ignored: int) -> None:
        """The inputs have been looked at: so many to do, so many there already, so many files passed over."""

    def made(self, item: Item, made: Made, server: str) -> None:
        """A result is in its place."""

    def failed(self, failure: Failure) -> None:
        """A picture will have no result."""

    def says(self, line: str) -> None:
        """Something else happened that a person may want to know."""


def upscale_folder(
    inputs: Path | Sequence[Path],
    output: Path,
    options: BatchOptions | None = None,
    watcher: Watcher | None = None,
) -> BatchReport:
    """Upscales the pictures of folders, files and lists into the tree `output`; the same call goes on after a stop.

    Raises HostError for what stops it before the first picture; what happens to one picture is in the report.
    """
    batch = _Batch([inputs] if isinstance(inputs, Path) else list(inputs), output, options, watcher)
    return batch.run()


class _Batch:
    def __init__(
        self, inputs: Sequence[Path], output: Path, options: BatchOptions | None, watcher: Watcher | None
    ) -> None:
        self.options, self.watcher = options or BatchOptions(), watcher or Watcher()
        self.output, self.report = output.expanduser().resolve(), BatchReport()
        self.carrier = self.options.carrier()
        self.found: Inputs = find_inputs(inputs, self.output, self.options.suffix, keep_suffix=self.options.keep_suffix)
        self.settings = self.options.settings(self.carrier)
        self.digest = settings_digest(self.settings)
        self.weights = self._weights_digest()

    def run(self) -> BatchReport:
        started = time.monotonic()
        _make_folder(self.output)
        with _open_manifest(self.output) as self.manifest:
            tasks = self._tasks()
            self.watcher.begins(len(tasks), self.report.there, self.found.ignored)
            for failure in self.found.failures:
                self._failed(failure)
            if tasks:
                self._describe()
                self._serve(tasks)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _describe(self) -> None:
        try:
            self.manifest.describe(self.digest, self.settings)
        except OSError as error:
            raise HostError(f"the manifest {self.manifest.path} cannot be written: {error.strerror}") from error

    def _tasks(self) -> list[Task]:
        """Returns what is to be done; counts what is there."""
        tasks = []
        for index, item in enumerate(self.found.items):
            if not self.options.force and self.manifest.is_done(item, self.digest, self.weights):
                self.report.there += 1
            elif not self.options.force and self.manifest.is_foreign(item):
                reason = f"has a file {item.output} in its way that no batch made: move it, or give --force"
                self.found.failures.append(Failure(item.name, reason))
            else:
                tasks.append(Task(item, index))
        return tasks

    def _serve(self, tasks: list[Task]) -> None:
        self.board = Board(tasks, self._failed)
        growing = self.options.ray is not None
        serving = Serving(
            self.board, self._order, self._keep, self.watcher.says, self.options.patience, growing=growing
        )
        try:
            if self.options.ray is not None:
                from .ray_lanes import serve_on_ray

                serve_on_ray(serving, self.carrier, self.options)
            else:
                for lane in self._lanes():
                    serving.add(lane)
                serving.wait()
        except BaseException:
            self.board.abort("was stopped")
            serving.end()
            raise
        self.report.ended, self.report.left = self.board.reason, self.board.left

    def _lanes(self) -> list[Lane]:
        slots, timeout = self.options.in_flight, self.options.timeout
        if not self.options.servers:
            comfyui = self.options.comfyui or chosen_comfyui()
            if comfyui is None:
                raise HostError("no server and no ComfyUI folder was given")
            return [OwnLane(comfyui, self.carrier, models=self.options.models, slots=slots, timeout=timeout)]
        addresses = dict.fromkeys(self.options.servers)
        clients = [ComfyClient(address, self.options.key) for address in addresses]
        return [ServerLane(client, self.carrier, slots=slots, timeout=timeout) for client in clients]

    def _order(self, task: Task) -> Order:
        colors = None
        if self.options.window > 1:
            from .frames import window_statistics

            colors = window_statistics([item.source for item in self.found.items], task.index, self.options.window)
        folder = (self.output / task.item.output).parent
        return Order(
            name=task.item.name,
            source=task.item.source,
            suffix=self.options.suffix,
            quality=self.options.quality,
            folder=str(folder),
            colors=colors,
        )

    def _keep(self, task: Task, made: Made, server: str) -> None:
        """Records a result and puts it in its place."""
        part = Path(made.part or "")
        try:
            stat = os.stat(task.item.source)
            entry = Entry(
                input=task.item.name,
                input_sha256=made.input_sha256,
                input_bytes=stat.st_size,
                input_mtime_ns=stat.st_mtime_ns,
                settings=self.digest,
                weights=self.weights,
                output=task.item.output,
                output_sha256=made.output_sha256,
                output_bytes=made.output_bytes,
                seconds=round(made.seconds, 3),
                server=server,
                notes=made.notes,
            )
            self.manifest.keep(entry, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in DISK_ERRORS:
                self.board.abort(f"the output folder cannot be written to: {error.strerror}")
            self._failed(Failure(task.item.name, f"has a result that cannot be kept: {error.strerror}"))
            return
        self.report.done += 1
        self.watcher.made(task.item, made, server)

    def _failed(self, failure: Failure) -> None:
        self.report.failures.append(failure)
        self.watcher.failed(failure)

    def _weights_digest(self) -> str | None:
        """Returns the sha256 of the weights where they are ours to see: with a ComfyUI of our own."""
        names = [n["inputs"].get("weights") for n in self.carrier.prompt.values() if n["class_type"] == LOADER]
        if self.options.servers or len(names) != 1 or not isinstance(names[0], str):
            return None
        folders = [PACK / "weights", *([self.options.models / "tadsr"] if self.options.models else [])]
        return next((file_digest(folder / names[0]) for folder in folders if (folder / names[0]).is_file()), None)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"the output folder {folder} cannot be made: {error.strerror}") from error


@contextmanager
def _open_manifest(folder: Path) -> Iterator[Manifest]:
    with ExitStack() as stack:
        try:
            manifest = stack.enter_context(Manifest(folder))
        except OSError as error:
            raise HostError(f"the output folder {folder} cannot be written to: {error.strerror}") from error
        yield manifest
