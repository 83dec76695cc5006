"""One run of a training command: its folder, its logs, its checkpoints, and how it is stopped and taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rlhf_ray.config.settings import CheckpointSettings, RunConfig
from rlhf_ray.failures import Stopped
from rlhf_ray.runtime.stopping import stop_signals
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.metrics import MetricKind
from rlhf_ray.tracking.run_folder import CHECKPOINT_STATE, write_atomic
from rlhf_ray.tracking.tracker import Tracker, changed_settings, open_folder

State = TypeVar("State")


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

    def __enter__(self) -> Self:
        self._stack.enter_context(self.tracker)
        self._stop = self._stack.enter_context(stop_signals())
        if self._changed:
            self.tracker.events.write("settings_changed", changes=self._changed)
            self.tracker.display.message(f"resuming with other settings than before: {'; '.join(self._changed)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def restore(self, state: type[State]) -> tuple[State, Path] | None:
        """The latest checkpoint's state and folder, or None at the start of a run.

        Rows of `metrics.jsonl` beyond it are dropped: their steps are done again.
        """
        if not self._resume:
            return None
        latest = self.folder.latest_checkpoint()
        if latest is None:
            dropped = self.tracker.metrics.truncate_after(0)
            self.tracker.events.write("nothing_to_resume", dropped_rows=dropped)
            self.tracker.display.message(f"{self.folder.path} has no checkpoint: the run begins at its first step")
            return None
        step, path = latest
        self.tracker.phase(f"loading the checkpoint of step {step}")
        found = read_state(path, state)
        dropped = self.tracker.metrics.truncate_after(step)
        self.tracker.events.write("checkpoint_loaded", step=step, path=str(path), dropped_rows=dropped)
        return found, path.absolute()

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
        path = self.folder.checkpoint_path(step)
        if (path / CHECKPOINT_STATE).exists():
            return  # of this very step: nothing has changed since
        self.tracker.phase("saving a checkpoint")
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        save(str(path.absolute()))
        write_state(path, state)
        self.folder.prune(self._checkpoints.keep)
        self.tracker.events.write("checkpoint_saved", step=step, path=str(path))


def write_state(checkpoint: Path, state: Any) -> None:
    """What the loop must remember, a dataclass. Written last: it makes the checkpoint a complete one."""
    write_atomic(checkpoint / CHECKPOINT_STATE, json.dumps(asdict(state)) + "\n")


def read_state(checkpoint: Path, state: type[State]) -> State:
    """What `write_state` wrote."""
    return state(**json.loads((checkpoint / CHECKPOINT_STATE).read_text(encoding="utf-8")))
