"""Writing the checkpoints of a run beside the steps that follow.

A learner serves one call after the other, so its state is written as it was when it was asked to write it, and its next
update waits for that; the driver does not. What is left to do when the learners are done (bringing the files to disk,
hashing them, the manifest) is done in a thread of the driver.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, fields
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

from rlhf_ray.config.settings import CheckpointSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.runtime.answers import Answer, collect
from rlhf_ray.runtime.copying import Copying
from rlhf_ray.tracking.manifest import begin, checkpoint_bytes, write_manifest
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic
from rlhf_ray.tracking.tracker import Tracker

State = TypeVar("State")
Save = Callable[[str], Sequence[Answer[Any]]]
"""Asks the learners to write their state into a folder."""

STATE_FILE = "state.json"
"""What the loop must remember, in a checkpoint."""


class CheckpointWriter:
    """Writes one checkpoint after the other.

    Args:
        tracker: of the run, where each is told of.
        settings: how many are kept.
        timeout_s: how long the learners may take.
        copying: to where each is copied.
    """

    def __init__(
        self, tracker: Tracker, settings: CheckpointSettings, timeout_s: float, copying: Copying | None = None
    ) -> None:
        self._settings, self._timeout_s, self._copying = settings, timeout_s, copying
        self._folder, self._events = tracker.folder, tracker.events
        self._writing: Future[None] | None = None
        self.kept: int | None = None
        """Step of the checkpoint that was written, or begun, last."""

    def begin(self, step: int, state: Any, save: Save) -> None:
        """Ask for a checkpoint of what there is now. One that is still being written is waited for first.

        Args:
            state: a dataclass, what the loop itself must remember.

        Raises:
            RoleFailure: of the one before; or the disk is full.
        """
        self.settle()
        if step == self.kept:
            return  # of this very step: nothing has changed since
        path = self._folder.checkpoint_path(step)
        try:
            if path.exists():
                shutil.rmtree(path)
            self._make_room()
            refuse_full_disk(self._folder)
            begin(path)
            answers = save(str(path.absolute()))
        except OSError as error:
            raise _not_written(step, error) from None
        self.kept = step
        self._writing = writing = Future[None]()
        work = step, path, _encoded(state), answers, writing
        # Not of a pool: these keep the process from ending, however long a learner does not answer.
        threading.Thread(target=self._complete, args=work, name="checkpoint", daemon=True).start()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint that was asked for is complete.

        Args:
            timeout_s: go on after that, while it is still being written.

        Raises:
            RoleFailure: it could not be written.
        """
        if self._writing is None or not wait([self._writing], timeout_s).done:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except RoleFailure:
            self.kept = None
            raise

    def drop(self, timeout_s: float | None = None) -> None:
        """As `settle`, where the run has failed already: that this checkpoint did, too, is one event more."""
        try:
            self.settle(timeout_s)
        except RoleFailure as failure:
            self._events.write("checkpoint_failed", role=failure.role, node=failure.node, cause=failure.cause)

    def _make_room(self) -> None:
        """Where the disk is short of it, wait for the checkpoint that is kept only to be copied."""
        if self._copying is not None and self._copying.reading is not None and not has_room(self._folder):
            self._copying.settle(self._timeout_s)
            self._folder.prune(self._settings.keep)

    def _complete(
        self, step: int, path: Path, state: str, answers: Sequence[Answer[Any]], writing: Future[None]
    ) -> None:
        try:
            self._finish(step, path, state, answers)
        except BaseException as error:  # whoever waits for it is told
            writing.set_exception(error)
        else:
            writing.set_result(None)

    def _finish(self, step: int, path: Path, state: str, answers: Sequence[Answer[Any]]) -> None:
        collect(answers, self._timeout_s)
        try:
            _write(path, state)
            self._folder.prune(self._settings.keep, but=self._copying.reading if self._copying else None)
        except OSError as error:
            raise _not_written(step, error) from None
        self._events.write("checkpoint_saved", step=step, path=str(path))
        if self._copying is not None:
            self._copying.begin(step, path)


def refuse_full_disk(folder: RunFolder) -> None:
    """End the run where the next checkpoint, if it is as large as the last, does not fit the disk.

    Raises:
        RoleFailure: with the room there is and the room it takes. Nothing has been written.
    """
    latest = folder.latest_checkpoint()
    if latest is not None and not has_room(folder):
        needed, free = checkpoint_bytes(latest[1]), shutil.disk_usage(folder.path).free
        cause = (
            f"the disk of {folder.path} has {free:,} bytes left, and a checkpoint takes {needed:,}; nothing was "
            f"written, that of step {latest[0]} stays: make room or lower checkpoint.keep, and continue with --resume"
        )
        raise RoleFailure(FailureKind.FATAL, "driver", gethostname(), cause, guard="disk")


def has_room(folder: RunFolder) -> bool:
    """Whether another checkpoint, as large as the newest, fits the disk."""
    latest = folder.latest_checkpoint()
    return latest is None or checkpoint_bytes(latest[1]) <= shutil.disk_usage(folder.path).free


def write_state(checkpoint: Path, state: Any) -> None:
    """What the loop must remember, a dataclass; and the manifest, which makes the checkpoint a complete one."""
    _write(checkpoint, _encoded(state))


def read_state(checkpoint: Path, state: type[State]) -> State:
    """What `write_state` wrote; what an earlier version remembered beside it is left out."""
    written = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    known = {field.name for field in fields(state)}  # type: ignore[arg-type]
    return state(**{name: value for name, value in written.items() if name in known})


def _encoded(state: Any) -> str:
    return json.dumps(asdict(state)) + "\n"


def _write(checkpoint: Path, state: str) -> None:
    write_atomic(checkpoint / STATE_FILE, state)
    write_manifest(checkpoint)


def _not_written(step: int, error: OSError) -> RoleFailure:
    cause = f"the checkpoint of step {step} could not be written: {error}"
    return RoleFailure(FailureKind.FATAL, "driver", gethostname(), cause, guard="disk")
