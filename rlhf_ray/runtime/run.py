"""One run of a training command: its folder, its logs, its checkpoints, and how it is stopped and taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import Any, Self, TypeVar

from rlhf_ray.config.settings import CheckpointSettings, RunConfig
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure, Stopped
from rlhf_ray.runtime.stopping import stop_signals
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.manifest import begin, checkpoint_bytes, find_fault, revoke, was_completed, write_manifest
from rlhf_ray.tracking.metrics import MetricKind
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic
from rlhf_ray.tracking.tracker import Tracker, changed_settings, open_folder

State = TypeVar("State")

STATE_FILE = "state.json"
"""What the loop must remember, in a checkpoint."""


class Run:
    """A context manager around a run; what happens inside is logged, and a failure is logged with its cause.

    Args:
        config: of the run.
        kind: which metrics it has.
        title: for the display.
        total_steps: of the whole run.
        columns: for the display.
        checkpoints: when to write one, and how many to keep.
        resume: continue what the folder holds; a run begins where it holds none.
    """

    def __init__(
        self,
        config: RunConfig,
        kind: MetricKind,
        title: str,
        total_steps: int,
        columns: Sequence[Column],
        checkpoints: CheckpointSettings,
        resume: bool,
    ) -> None:
        self._checkpoints, self._resume = checkpoints, resume
        self._changed = changed_settings(config) if resume else []
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(open_folder(config, resume))
        self.tracker = Tracker(config, kind, self.folder, title, total_steps, columns)
        self._stop: Sequence[int] = ()
        self._sound: tuple[int, Path] | None = None
        self._kept: int | None = None
        """Step of the checkpoint that this process has loaded or written last."""

    def __enter__(self) -> Self:
        with self._stack as stack:  # closed with the folder's lock, if one of these fails
            stack.enter_context(self.tracker)
            self._stop = stack.enter_context(stop_signals())
            if self._changed:
                self.tracker.events.write("settings_changed", changes=self._changed)
                self.tracker.display.message(f"resuming with other settings than before: {'; '.join(self._changed)}")
            if self._resume:
                self._sound = self.sound_checkpoint()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def restore(self, state: type[State]) -> tuple[State, Path] | None:
        """The latest checkpoint's state and folder, or None at the start of a run.

        Rows of `metrics.jsonl` and `ledger.jsonl` beyond it are dropped: their steps are done again.
        """
        if self._sound is None:
            if self._resume:
                dropped = self.tracker.truncate_after(0)
                self.tracker.events.write("nothing_to_resume", dropped_rows=dropped)
                self.tracker.display.message(f"{self.folder.path} has no checkpoint: the run begins at its first step")
            return None
        step, path = self._sound
        self.tracker.phase(f"loading the checkpoint of step {step}")
        found = read_state(path, state)
        dropped = self.tracker.truncate_after(step)
        self._kept = step
        self.tracker.events.write("checkpoint_loaded", step=step, path=str(path), dropped_rows=dropped)
        return found, path.absolute()

    def go_back(self, failure: RoleFailure) -> None:
        """From now on `restore` gives the newest checkpoint, as in a run that is resumed.

        Args:
            failure: why.
        """
        self._resume = True
        self._sound, rows = self.sound_checkpoint(), self.tracker.metrics.read().rows
        done, back_to = int(rows[-1]["step"] or 0) if rows else 0, self._sound[0] if self._sound else 0
        self.tracker.events.write(
            "rolled_back", role=failure.role, cause=failure.cause, from_step=done, to_step=back_to
        )
        self.tracker.display.message(
            f"lost {failure.role} on {failure.node} ({failure.cause}); going on from step {back_to}"
        )

    def sound_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint that is as it was written, or None where none was ever completed.

        Newer ones that are damaged, or were never completed, are named, and count as incomplete from now on.

        Raises:
            BadInput: there were checkpoints, and not one of them is whole.
        """
        broken: list[tuple[Path, str]] = []
        for step, path in reversed(self.folder.all_checkpoints()):
            self.tracker.phase(f"checking the files of step {step}'s checkpoint")
            cause = find_fault(path)
            if cause is None:
                for each, _ in broken:
                    revoke(each)
                return step, path
            broken.append((path, cause))
            self.tracker.events.write("checkpoint_broken", cause=cause, step=step, path=str(path))
            self.tracker.display.message(f"the checkpoint of step {step} cannot be used: {cause}")
        if not any(was_completed(path) for path, _ in broken):
            return None  # the process that wrote the first one ended before it was done
        found = "; ".join(f"{path.name}: {cause}" for path, cause in broken)
        raise BadInput(
            str(self.folder.checkpoints),
            f"not one checkpoint is whole ({found})",
            "restore the files of one, or begin again under another run.name",
        )

    def keep(self, step: int, state: Any, save: Callable[[str], object]) -> None:
        """Between two steps: write a checkpoint when one is due, and end the run when that was asked for.

        Args:
            step: steps done.
            state: a dataclass, what the loop itself must remember.
            save: makes the learners write theirs into a folder, and waits for them.

        Raises:
            Stopped: by a signal; there is a checkpoint of this step.
        """
        if not self._stop:
            if step and step % self._checkpoints.every_steps == 0:
                self._save(step, state, save)
            return
        self._save(step, state, save)
        cause = f"signal {self._stop[0]}"
        self.tracker.events.write("run_stopped", cause=cause, step=step)
        raise Stopped(f"stopped by {cause} after step {step}; continue with --resume")

    def _save(self, step: int, state: Any, save: Callable[[str], object]) -> None:
        if step == self._kept:
            return  # of this very step: nothing has changed since
        path = self.folder.checkpoint_path(step)
        self.tracker.phase("saving a checkpoint")
        try:
            if path.exists():
                shutil.rmtree(path)
            refuse_full_disk(self.folder)
            begin(path)
            save(str(path.absolute()))
            write_state(path, state)
            self.folder.prune(self._checkpoints.keep)
        except OSError as error:
            cause = f"the checkpoint of step {step} could not be written: {error}"
            raise RoleFailure(FailureKind.FATAL, "driver", gethostname(), cause, guard="disk") from None
        self._kept = step
        self.tracker.events.write("checkpoint_saved", step=step, path=str(path))


def refuse_full_disk(folder: RunFolder) -> None:
    """End the run where the next checkpoint, if it is as large as the last, does not fit the disk.

    Raises:
        RoleFailure: with the room there is and the room it takes. Nothing has been written.
    """
    latest = folder.latest_checkpoint()
    needed = checkpoint_bytes(latest[1]) if latest is not None else 0
    free = shutil.disk_usage(folder.path).free
    if latest is not None and free < needed:
        cause = (
            f"the disk of {folder.path} has {free:,} bytes left, and a checkpoint takes {needed:,}; nothing was "
            f"written, that of step {latest[0]} stays: make room or lower checkpoint.keep, and continue with --resume"
        )
        raise RoleFailure(FailureKind.FATAL, "driver", gethostname(), cause, guard="disk")


def write_state(checkpoint: Path, state: Any) -> None:
    """What the loop must remember, a dataclass; and the manifest, which makes the checkpoint a complete one."""
    write_atomic(checkpoint / STATE_FILE, json.dumps(asdict(state)) + "\n")
    write_manifest(checkpoint)


def read_state(checkpoint: Path, state: type[State]) -> State:
    """What `write_state` wrote."""
    return state(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
