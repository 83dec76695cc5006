"""Copying a run away from its machine, beside everything else: a place far away may be slow, or not answer at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
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
        self._under_way: tuple[str, Future[None]] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether files are being read."""
        return self._under_way is not None and not self._under_way[1].done()

    def begin(self, step: int, checkpoint: Path) -> None:
        """Copy a checkpoint, unless the one before is still on its way: then this one stays here alone."""
        what = f"the checkpoint of step {step}"
        if self._under_way is not None and self.is_under_way:
            self._tell(what, f"{self._under_way[0]} is still on its way")
        else:
            self._start(what, partial(self._copy.send, self._tracker.folder, checkpoint))

    def finish(self, timeout_s: float) -> None:
        """Copy what a finished run has left behind, its summary last."""
        if self.settle(timeout_s):
            self._start("the results", partial(self._copy.send_results, self._tracker.folder))
            self.settle(timeout_s)

    def settle(self, timeout_s: float) -> bool:
        """Wait for what is on its way; False, and told, where that takes too long."""
        if self._under_way is None or wait([self._under_way[1]], timeout_s).done:
            return True
        self._tell(self._under_way[0], f"it is still on its way after {timeout_s:g} s")
        return False

    def _start(self, what: str, send: Callable[[], None]) -> None:
        done = Future[None]()
        self._under_way = what, done
        # Of no pool: these keep the process from ending, however long the place does not answer.
        threading.Thread(target=self._send, args=(what, send, done), name="copy", daemon=True).start()

    def _send(self, what: str, send: Callable[[], None], done: Future[None]) -> None:
        try:
            send()
        except Exception as error:  # each file system has errors of its own
            self._tell(what, f"{type(error).__name__}: {error}")
        finally:
            done.set_result(None)

    def _tell(self, what: str, cause: str) -> None:
        self._tracker.events.write("copy_failed", what=what, cause=cause)
        self._tracker.display.message(f"{what} could not be copied: {cause}")
