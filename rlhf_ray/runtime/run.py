"""One run of a training command: its folder, its logs, its checkpoints, and how it is stopped and taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rlhf_ray.config.settings import CheckpointSettings, RunConfig
from rlhf_ray.failures import BadInput, RoleFailure, Stopped, first_sentence
from rlhf_ray.runtime.checkpoints import CheckpointWriter, Save, read_state
from rlhf_ray.runtime.copying import Copying
from rlhf_ray.runtime.stopping import stop_signals
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.manifest import find_fault, revoke, was_completed
from rlhf_ray.tracking.metrics import MetricKind
from rlhf_ray.tracking.run_copy import RunCopy
from rlhf_ray.tracking.tracker import Tracker, changed_settings, open_folder

State = TypeVar("State")

_LAST_CHECKPOINT_S = 120.0
"""How long the end of a run waits for a checkpoint that is being written."""


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
        self._every_steps, self._resume = checkpoints.every_steps, resume
        self._changed = changed_settings(config) if resume else []
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(open_folder(config, resume))
        self.tracker = Tracker(config, kind, self.folder, title, total_steps, columns)
        copy = RunCopy.of(checkpoints, config.run.name)
        self._copying = None if copy is None else Copying(copy, self.tracker)
        self._timeout_s = config.cluster.call_timeout_s
        self._writer = CheckpointWriter(self.tracker, checkpoints, self._timeout_s, self._copying)
        self._stop: Sequence[int] = ()
        self._sound: tuple[int, Path] | None = None

    def __enter__(self) -> Self:
        with self._stack as stack:  # closed with the folder's lock, if one of these fails
            stack.enter_context(self.tracker)
            if self._copying is not None:
                stack.callback(self._copying.settle, _LAST_CHECKPOINT_S)
            stack.callback(self._writer.drop, _LAST_CHECKPOINT_S)
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
        try:
            if self._copying is not None and self.folder.summary.exists():  # also of a reward model that was refused
                self._writer.drop(_LAST_CHECKPOINT_S)
                self._copying.finish(self._timeout_s)
        finally:
            self._stack.__exit__(kind, error, trace)

    def restore(self, state: type[State]) -> tuple[State, Path] | None:
        """The latest checkpoint's state and folder, or None at the start of a run.

        Rows of `metrics.jsonl` and `ledger.jsonl` beyond it are dropped: their steps are done again.
        """
        if self._sound is None:
            if self._resume:
                dropped = self.tracker.truncate_after(0)
                self.tracker.events.write("nothing_to_resume", dropped_rows=dropped)
                if dropped:  # where nothing was done yet there is nothing to say: one command begins and resumes
                    cause = f"{self.folder.path} has no checkpoint"
                    self.tracker.display.message(f"{cause}: the run begins again at its first step")
            return None
        step, path = self._sound
        self.tracker.phase(f"loading the checkpoint of step {step}")
        found = read_state(path, state)
        dropped = self.tracker.truncate_after(step)
        self._writer.kept = step
        self.tracker.events.write("checkpoint_loaded", step=step, path=str(path), dropped_rows=dropped)
        return found, path.absolute()

    def go_back(self, failure: RoleFailure) -> None:
        """From now on `restore` gives the newest checkpoint, as in a run that is resumed.

        Args:
            failure: why.
        """
        self._writer.drop()
        self._resume = True
        self._sound, rows = self.sound_checkpoint(), self.tracker.metrics.read()
        done, back_to = int(rows[-1]["step"] or 0) if rows else 0, self._sound[0] if self._sound else 0
        self.tracker.events.write(
            "rolled_back", role=failure.role, cause=failure.cause, from_step=done, to_step=back_to
        )
        self.tracker.display.message(
            f"lost {failure.role} on {failure.node} ({first_sentence(failure.cause)}); going on from step {back_to}"
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

    def keep(self, step: int, state: Any, save: Save) -> None:
        """Between two steps: begin a checkpoint when one is due, and end the run when that was asked for.

        Args:
            step: steps done.
            state: a dataclass, what the loop itself must remember; read once the learners are asked.
            save: asks the learners to write theirs into a folder.

        Raises:
            RoleFailure: a checkpoint, this one or the one before, could not be written.
            Stopped: by a signal; there is a checkpoint of this step, if it is not step 0.
        """
        if not self._stop:
            self._writer.settle(timeout_s=0.0)
            if step and step % self._every_steps == 0:
                self.tracker.phase("saving a checkpoint")
                self._writer.begin(step, state, save)
            return
        if step:  # before the first one there is nothing that a new run would not have
            self.tracker.phase("saving a checkpoint")
            self._writer.begin(step, state, save)
            self._writer.settle()
            if self._copying is not None:
                self._copying.settle(self._timeout_s)
        cause = f"signal {self._stop[0]}"
        self.tracker.events.write("run_stopped", cause=cause, step=step)
        raise Stopped(f"stopped by {cause} after step {step}; continue with --resume")
