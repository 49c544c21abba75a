"""What a run shows and writes while it goes: progress bar, TensorBoard scalars, one JSON line per report."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.data.storage import write_atomically

LOG_NAME, TENSORBOARD_FOLDER = "log.jsonl", "tensorboard"


class Progress:
    """Reports of one run; on processes other than the main one it does nothing."""

    def __init__(self, output: Path, steps: int, start: int, shown: bool) -> None:
        """start: the step that the run resumes at; shown: whether this is the main process."""
        self.log = output / LOG_NAME
        self.bar = tqdm(total=steps, initial=start, unit="step", smoothing=0.05, disable=not shown)
        self.board: SummaryWriter | None = None
        self._thread_hook = threading.excepthook
        if shown:
            self._forget_after(start)
            threading.excepthook = _without_full_disks
            self.board = SummaryWriter(str(output / TENSORBOARD_FOLDER), purge_step=start + 1 if start else 0)
        self.started, self.start = time.monotonic(), start

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._thread_hook
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _forget_after(self, step: int) -> None:
        """Takes the lines of steps that will be done again out of the log."""
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if kept != lines:
                write_atomically(self.log, "".join(kept).encode())

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        """Moves the bar to `step`, the number of steps done, and shows the losses beside it."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values to the JSONL file and to TensorBoard."""
        if self.board is None:
            return
        speed = (step - self.start) / max(1e-9, time.monotonic() - self.started)
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "steps_per_second": round(speed, 4), **values}) + "\n")
        except OSError as error:  # of a write, which does not name its file
            raise OSError(error.errno, error.strerror, str(self.log)) from error
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self.board is not None:
            tqdm.write(message)


def _without_full_disks(failure: threading.ExceptHookArgs) -> None:
    """Shows what ended a thread, but not what the disk did to TensorBoard's: its next write, or ours, tells that."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
