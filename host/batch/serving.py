"""Keeps the lanes of a batch at work: threads that take pictures, and what happens when a server fails."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..client import PromptRejected
from ..errors import BrokeOff, HostError, ServerFault, Stopped, Unusable
from ..pictures import PictureError
from .board import Board, Claim, Task
from .lanes import Lane
from .making import Made, Order

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
PATIENCE_SECONDS = 120.0  # without any server, a batch ends
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)  # of no picture, but of all
UNUSABLE = "no server can be used"


class Serving:
    """The lanes of a batch and the threads on them. `say` gets one line for each change of a server's health."""

    def __init__(
        self,
        board: Board,
        order: Callable[[Task], Order],
        keep: Callable[[Task, Made, str], None],
        say: Callable[[str], None],
        patience: float = PATIENCE_SECONDS,
        *,
        growing: bool = False,
    ) -> None:
        """growing: more lanes may come, so that none is no reason to end before the patience does."""
        self.growing, self._last_alive = growing, time.monotonic()
        self.board, self.order, self.keep, self.say, self.patience = board, order, keep, say, patience
        self.error: BaseException | None = None
        self._health: list[_Health] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def add(self, lane: Lane) -> None:
        """Puts a lane to work; also in the middle of a batch."""
        health = _Health(lane)
        with self._lock:
            self._health.append(health)
        for slot in range(lane.slots):
            thread = threading.Thread(target=self._work, args=(health, slot), daemon=True, name=f"{lane.name}-{slot}")
            self._threads.append(thread)
            thread.start()

    def wait(self, on_look: Callable[[], None] = lambda: None) -> None:
        """Returns once the board is finished and every thread has ended; raises what went wrong inside one."""
        while not self.board.finished.wait(0.2):
            on_look()
            self.look()
        self.end()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Waits for the threads of a finished board, and closes every lane."""
        for thread in self._threads:
            thread.join()
        for health in self._health:
            health.lane.close()

    def _work(self, health: _Health, slot: int) -> None:
        try:
            while self._usable(health):
                claim = self.board.take(health.lane.name)
                if claim is None:
                    return
                self._serve(health, slot, claim)
        except BaseException as error:  # a fault of this program's must not leave the batch hanging
            self.error = self.error or error
            self.board.abort(str(error))

    def _serve(self, health: _Health, slot: int, claim: Claim) -> None:
        health.busy += 1
        try:
            made = health.lane.make(self.order(claim.task), slot, claim.stop)
        except Stopped:
            self.board.give_back(claim, "was given up", counts=False)
        except ServerFault as error:
            self.board.give_back(claim, f"failed: {error}", counts=isinstance(error, BrokeOff))
            self._down(health, error)
        except PictureError as error:
            self.board.give_back(claim, str(error), counts=True, final=True)
        except Unusable as error:
            self.board.give_back(claim, f"failed: {error}", counts=False)
            self._refuse(health, error)
        except PromptRejected as error:
            self.board.give_back(claim, f"failed: {error}", counts=True, final=True)
        except HostError as error:
            self.board.give_back(claim, f"failed: {error}", counts=True)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                self.board.abort(f"the output folder cannot be written to: {error.strerror}")
            self.board.give_back(
                claim, f"has a result that cannot be written: {error.strerror}", counts=True, final=True
            )
        else:
            if health.failures:
                self.say(f"{health.lane.name} works again")
            health.failures = 0
            if self.board.settle(claim):
                self.keep(claim.task, made, health.lane.name)
            elif made.part is not None:
                Path(made.part).unlink(missing_ok=True)
        finally:
            health.busy -= 1

    def _usable(self, health: _Health) -> bool:
        """Returns whether a lane works now, opening it first where needed; False when it or the batch has ended."""
        while not self.board.finished.is_set() and health.dead is None:
            with health.lock:
                if health.up:
                    return True
                if health.dead is None and time.monotonic() >= health.next_try:
                    self._open(health)
                    continue
            self.board.finished.wait(0.1)
        return False

    def _open(self, health: _Health) -> None:
        try:
            health.lane.open()
        except ServerFault as error:
            self._down(health, error)
        except HostError as error:
            self._refuse(health, error)
        else:
            health.up = True

    def _refuse(self, health: _Health, error: HostError) -> None:
        with self._lock:
            if health.dead is None:
                self.say(f"not used: {error}")
                health.dead = str(error)

    def _down(self, health: _Health, error: ServerFault) -> None:
        with self._lock:
            if health.failures == 0:
                self.say(f"{health.lane.name} is left for now: {error}")
                health.down_since = time.monotonic()
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**health.failures)
            health.up, health.failures = False, health.failures + 1
            health.next_try = time.monotonic() + pause

    def look(self) -> None:
        """Ends the batch when no lane can be used any more, or has been for longer than the patience."""
        alive = [health for health in self._health if health.dead is None]
        if alive:
            self._last_alive = time.monotonic()
        elif not self.growing or time.monotonic() - self._last_alive > self.patience:
            reasons = dict.fromkeys(str(health.dead) for health in self._health)
            self.board.abort(f"{UNUSABLE}: {'; '.join(reasons) or 'there is none'}")
        lost = [time.monotonic() - health.down_since for health in alive if health.failures and not health.busy]
        if lost and len(lost) == len(alive) and min(lost) > self.patience:
            self.board.abort(f"{UNUSABLE}: none has answered for {self.patience:.0f} s")


class _Health:
    """A lane, and whether it works."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.lock = threading.Lock()
        self.up, self.failures, self.next_try, self.busy = False, 0, 0.0, 0
        self.down_since = time.monotonic()
        self.dead: str | None = None
