"""Which picture is whose: hands pictures to servers, takes them back from those that fail, and knows the end."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .inputs import Failure, Item

TRIES = 3  # a picture is tried again twice
SLOW_FACTOR, SLOW_SECONDS = 3.0, 5.0  # a copy goes to an idle server when a picture takes this much longer than usual
_RECENT = 50
_POLL_SECONDS = 0.25


@dataclass(eq=False)
class Task:
    """A picture to do, its place among the inputs, and how often it has been tried."""

    item: Item
    index: int
    tries: int = 0
    claims: list[Claim] = field(default_factory=list)
    settled: bool = False


@dataclass(eq=False)
class Claim:
    """A server's hold of a task; `stop` is set when nobody wants the result any more."""

    task: Task
    server: str
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)


class Board:
    """The tasks of a batch, for the threads that serve them. Every method may be called from any thread."""

    def __init__(self, tasks: Iterable[Task], on_failure: Callable[[Failure], None] = lambda failure: None) -> None:
        self._waiting: deque[Task] = deque(tasks)
        self._running: set[Task] = set()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._changed = threading.Condition()
        self._on_failure = on_failure
        self.finished = threading.Event()
        self.reason: str | None = None
        self.left = 0
        self._end_if_done()

    def take(self, server: str) -> Claim | None:
        """Returns a task for a server, waiting for one; None when there is nothing more to do."""
        with self._changed:
            while not self.finished.is_set():
                task = self._waiting.popleft() if self._waiting else self._slow_task(server)
                if task is not None:
                    claim = Claim(task, server)
                    task.claims.append(claim)
                    self._running.add(task)
                    return claim
                self._changed.wait(_POLL_SECONDS)
            return None

    def _slow_task(self, server: str) -> Task | None:
        """Returns a task that another server has had for long, to be done twice: the first result counts."""
        if len(self._seconds) == 0:
            return None
        late = time.monotonic() - max(SLOW_SECONDS, SLOW_FACTOR * statistics.median(self._seconds))
        slow = [
            task
            for task in self._running
            if len(task.claims) == 1 and task.claims[0].server != server and task.claims[0].started < late
        ]
        return min(slow, key=lambda task: task.claims[0].started, default=None)

    def settle(self, claim: Claim) -> bool:
        """Says that a result is there; returns whether it is the first, and so the one to keep."""
        with self._changed:
            if claim.task.settled or self.finished.is_set():
                self._release(claim)
                return False
            self._seconds.append(time.monotonic() - claim.started)
            claim.task.settled = True
            for other in claim.task.claims:
                other.stop.set()
            self._release(claim)
            return True

    def give_back(self, claim: Claim, reason: str, *, counts: bool, final: bool = False) -> None:
        """Puts a task back for another try; it fails when it has had all of them, or another cannot help (`final`)."""
        with self._changed:
            task = claim.task
            self._release(claim)
            task.tries += counts
            if task.settled or task.claims or self.finished.is_set():
                return
            if final or task.tries >= TRIES:
                task.settled = True
                self._on_failure(Failure(task.item.name, reason))
                self._end_if_done()
                return
            self._waiting.append(task) if counts else self._waiting.appendleft(task)
            self._changed.notify_all()

    def _release(self, claim: Claim) -> None:
        if claim in claim.task.claims:
            claim.task.claims.remove(claim)
        if not claim.task.claims:
            self._running.discard(claim.task)
        self._end_if_done(claim.task)

    def _end_if_done(self, releasing: Task | None = None) -> None:
        unsettled = releasing is not None and not releasing.settled
        if not self._waiting and not unsettled and all(task.settled for task in self._running):
            self.finished.set()
            self._wake()

    def abort(self, reason: str | None = None) -> None:
        """Ends the batch: what is in flight is given up, what waits is left; the first reason is kept."""
        with self._changed:
            if self.finished.is_set():
                return
            self.reason = reason
            self.left = len(self._waiting) + sum(not task.settled for task in self._running)
            self.finished.set()
            for task in self._running:
                for claim in task.claims:
                    claim.stop.set()
            self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
