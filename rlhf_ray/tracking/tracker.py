"""What every training command has in common: its folder, its logs, its sinks and its display."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import Self

import yaml

from rlhf_ray.config.load import dump_config
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import PPOConfig, RunConfig, SFTConfig
from rlhf_ray.failures import RoleFailure, Stopped
from rlhf_ray.tracking.display import Column, Display, open_display
from rlhf_ray.tracking.logs import EventLog, MetricsLog, truncate_after
from rlhf_ray.tracking.metrics import MetricKind, check_known
from rlhf_ray.tracking.run_copy import RunCopy
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic
from rlhf_ray.tracking.run_lock import refuse_locked, run_lock
from rlhf_ray.tracking.sinks import Sink, open_sinks

CopiedConfig = PPOConfig | SFTConfig | RewardModelConfig

_CLOCK_JUMP_S = 5.0
"""Less is what a clock that is kept right may move between two steps."""


def run_folder_path(config: RunConfig) -> str:
    """`<paths.runs>/<run.name>`."""
    return f"{config.paths.runs}/{config.run.name}"


class Tracker:
    """A context manager around one run.

    Args:
        config: of the run.
        kind: which metrics it has.
        folder: of the run.
        title: for the display.
        total_steps: of the whole run.
        columns: for the display.
    """

    def __init__(
        self,
        config: RunConfig,
        kind: MetricKind,
        folder: RunFolder,
        title: str,
        total_steps: int,
        columns: Sequence[Column],
    ) -> None:
        self._config, self._kind, self.folder = config, kind, folder
        self.events = EventLog(folder.events)
        self.metrics = MetricsLog(folder.metrics, self.events)
        self.display: Display = open_display(config.tracking.progress, title, total_steps, columns)
        self._sinks: list[Sink] = []
        self._stack = ExitStack()
        self._summary: dict[str, object] = {}
        self._started = time.monotonic()
        self._wall_clock = _WallClock()

    def __enter__(self) -> Self:
        self.events.write("run_started", name=self._config.run.name, kind_of_run=self._kind)
        self._sinks = open_sinks(
            self._config.tracking,
            self.folder,
            self._config.run.name,
            json.loads(self._config.model_dump_json()),
            self._sink_failed,
        )
        self._stack.enter_context(self.display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that was asked to stop has said so itself. On a full disk its own failure is the one that is raised.
        with suppress(RoleFailure):
            if isinstance(error, RoleFailure):
                self.events.write(
                    "run_failed",
                    role=error.role,
                    node=error.node,
                    cause=error.cause,
                    failure=error.kind.value,
                    guard=error.guard or None,
                )
            elif error is not None and not isinstance(error, Stopped):
                self.events.write("run_failed", cause=f"{type(error).__name__}: {error}")
        for sink in self._sinks:
            sink.close(self._summary)
        self._stack.close()

    @property
    def wall_s(self) -> float:
        """Seconds since this process took up the run."""
        return time.monotonic() - self._started

    def phase(self, text: str) -> None:
        """Say what is going on."""
        self.display.phase(text)

    def step(self, row: Mapping[str, float | int | None]) -> None:
        """Log one step everywhere, with the time since this process took up the run."""
        row = {**row, "wall_s": self.wall_s}
        check_known(self._kind, row)
        self.metrics.write(row)
        number = int(row["step"] or 0)
        jump = self._wall_clock.jump_s()
        if abs(jump) > _CLOCK_JUMP_S:
            cause = f"the clock was set by {jump:+.0f} s, or the machine slept; no duration depends on it"
            self.events.write("clock_jumped", node=gethostname(), cause=cause, step=number, jump_s=jump)
        for sink in self._sinks:
            sink.log(number, row)
        self.display.step(row)

    def truncate_after(self, step: int) -> int:
        """Drop what the metrics and the ledger say of steps after `step`, which are done again.

        Returns:
            How many rows of metrics were dropped.
        """
        truncate_after(self.folder.ledger, step)
        return truncate_after(self.folder.metrics, step)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write the summary, which makes the run a finished one."""
        self._summary = dict(summary)
        write_atomic(self.folder.summary, json.dumps(self._summary, indent=2, ensure_ascii=False) + "\n")
        self.events.write("run_finished")
        minutes, seconds = divmod(round(self.wall_s), 60)
        pages = (self.folder.samples_page, self.folder.evaluation_page)
        page = next((page for page in pages if page.exists()), self.folder.summary)
        self.display.message(f"done in {minutes}:{seconds:02d} min; look at {page}")

    def _sink_failed(self, name: str, cause: str) -> None:
        self.events.write("sink_failed", cause=cause, sink=name)
        self.display.message(f"{name} has failed: {cause}")


class _WallClock:
    """How much the wall clock moved beside the time that really went by."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def jump_s(self) -> float:
        """Since this was last asked."""
        before, self._ahead = self._ahead, time.time() - time.monotonic()
        return self._ahead - before


def check_folder(config: RunConfig, resume: bool = False) -> None:
    """See that the run's folder may be used, before anything is read or started.

    Raises:
        BadInput: it holds another run, or another process writes into it.
        Finished: there is nothing left to resume.
    """
    folder = RunFolder(Path(run_folder_path(config)))
    refuse_locked(folder.lock)
    folder.refuse_another_run(resume)


def changed_settings(config: RunConfig) -> list[str]:
    """How the configuration differs from the one that the run's folder was made with, `key: before -> now`."""
    path = RunFolder(Path(run_folder_path(config))).config_yaml
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else {}
    now = _flat(yaml.safe_load(dump_config(config)))
    keys = sorted(before.keys() | now.keys())
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before and before.get(key) != now.get(key)]


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def take_up_copy(config: CopiedConfig, resume: bool) -> None:
    """See that the run's copy can be written, and bring what it has into a folder that has less.

    Raises:
        BadInput: it is the copy of another run, or cannot be written or read.
        Finished: it is the copy of a run that has nothing left to do, and is here now.
    """
    copy = RunCopy.of(config.checkpoint, config.run.name)
    if copy is None:
        return
    copy.check(resume)
    folder = RunFolder(Path(run_folder_path(config)))
    if resume:
        with run_lock(folder.lock):
            step = copy.fetch(folder)
            if step is not None:
                EventLog(folder.events).write("copy_fetched", step=step, url=config.checkpoint.copy_to)
        folder.refuse_another_run(resume)


@contextmanager
def open_folder(config: RunConfig, resume: bool = False) -> Iterator[RunFolder]:
    """The run's folder, made or taken up again, and locked for the length of a block.

    Raises:
        BadInput, Finished: as `check_folder`; or the folder cannot be written.
    """
    path = run_folder_path(config)
    with run_lock(RunFolder(Path(path)).lock):
        # Asked again: what was found before the lock was held may have changed.
        yield RunFolder.create(path, dump_config(config), resume)
