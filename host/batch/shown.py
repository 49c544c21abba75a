"""Shows a batch on the terminal: a bar with pictures a second and the time left, and a line for each failure."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .inputs import Failure, Item, shown
from .making import Made
from .run import BatchReport, Watcher

QUIET_SECONDS = 30.0  # without a terminal, one line of progress this often


class Terminal(Watcher):
    """A watcher that prints; without a terminal, a line now and then takes the place of the bar."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def begins(self, total: int, there: int, ignored: int) -> None:
        parts = [f"{total} pictures to do"]
        parts += [f"{there} done before"] if there else []
        parts += [f"{ignored} other files passed over"] if ignored else []
        print(", ".join(parts), flush=True)
        every = 0.1 if sys.stderr.isatty() else QUIET_SECONDS
        self._bar = tqdm(total=total, unit="picture", mininterval=every, smoothing=0.05, disable=total == 0)

    def made(self, item: Item, made: Made, server: str) -> None:
        for note in made.notes:
            self.says(f"{shown(item.name)}: {note}")
        self._advance()

    def failed(self, failure: Failure) -> None:
        self.says(f"FAILED: {failure}")

    def says(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def ends(self, report: BatchReport) -> None:
        """Closes the bar, and lists what failed and why."""
        if self._bar is not None:
            self._bar.close()
        rate = f", {report.done / report.seconds:.2f} a second" if report.done else ""
        print(f"{report.done} pictures done in {_duration(report.seconds)}{rate}; {len(report.failures)} failed")
        for failure in report.failures:
            print(f"  {failure}")
        if report.ended:
            print(f"Ended early: {report.ended}; {report.left} pictures are left. The same command goes on.")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else time.strftime("%H:%M:%S", time.gmtime(seconds))
