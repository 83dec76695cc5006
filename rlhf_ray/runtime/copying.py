"""Copying a run away from its machine, beside everything else: a place far away may be slow, or not answer at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlhf_ray.tracking.run_copy import RunCopy
from rlhf_ray.tracking.tracker import Tracker


class Copying:
    """Makes one copy after the other. One that fails is told; the run goes on, and the next one sends what is missing.

    Args:
        copy: of the run.
        tracker: of the run.
    """

    def __init__(self, copy: RunCopy, tracker: Tracker) -> None:
        self._copy, self._tracker = copy, tracker
        self._changed = threading.Condition()
        self._sending: tuple[str, Path | None] | None = None
        self._next: tuple[str, Path | None, Callable[[], None]] | None = None

    @property
    def reading(self) -> Path | None:
        """The checkpoint on its way, which must stay until it is there."""
        with self._changed:
            return self._sending[1] if self._sending is not None else None

    def begin(self, step: int, checkpoint: Path) -> None:
        """Copy a checkpoint, once the one before is there; one that still waits for that gives way to it."""
        send = partial(self._copy.send, self._tracker.folder, checkpoint)
        self._begin(f"the checkpoint of step {step}", checkpoint, send)

    def finish(self, timeout_s: float) -> None:
        """Copy what a finished run has left behind, its summary last."""
        deadline = time.monotonic() + timeout_s
        self.settle(timeout_s)
        self._begin("the results", None, partial(self._copy.send_results, self._tracker.folder))
        self.settle(deadline - time.monotonic())

    def settle(self, timeout_s: float) -> None:
        """Wait until all is there. What is not in time is told, and given up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._sending is not None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            given_up = [each[0] for each in (self._sending, self._next) if each is not None]
            self._sending = self._next = None
        for what in given_up:
            self._tell(what, f"it was not there after {max(timeout_s, 0):.0f} s")

    def _begin(self, what: str, checkpoint: Path | None, send: Callable[[], None]) -> None:
        with self._changed:
            skipped, self._next = self._next, (what, checkpoint, send)
            if self._sending is None:
                self._sending = what, checkpoint
                # Of no pool: these keep the process from ending, however long the place does not answer.
                threading.Thread(target=self._work, name="copy", daemon=True).start()
        if skipped is not None:
            self._tell(skipped[0], f"{what} took its place before it could be sent")

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._sending = None
                    self._changed.notify_all()
                    return
                (what, checkpoint, send), self._next = self._next, None
                self._sending = what, checkpoint
            try:
                send()
            except Exception as error:  # each file system has errors of its own
                self._tell(what, f"{type(error).__name__}: {error}")

    def _tell(self, what: str, cause: str) -> None:
        self._tracker.events.write("copy_failed", what=what, cause=cause)
        self._tracker.display.message(f"{what} could not be copied: {cause}")
