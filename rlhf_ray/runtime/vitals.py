"""Signs of life of a process: whether its calls get on, and how often it had to be started again."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.waiting import is_waiting

_CALL_CPU_S = 0.005
_PROCESS_SHARE = 0.2
"""Processor time that shows work: of the threads that serve calls and of child processes; and, as a share of a core, of
the whole process, whose other threads also answer Ray."""


@dataclass(frozen=True)
class Pulse:
    """What a process says of itself.

    Attributes:
        pid, node_id, node: which process it is, and where.
        started: how many times the role has been started in all, this time included.
        doing: the calls under way.
        stuck_s: how long none of them has got on; None with nothing under way.
        last_words: why the process before this one ended, where that is known.
    """

    pid: int
    node_id: str
    node: str
    started: int
    doing: tuple[str, ...]
    stuck_s: float | None
    last_words: str | None


class CallClock:
    """Notices whether the calls of this process get on, from one look to the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, tuple[str, int]] = {}
        self._process = psutil.Process()
        self._seen: tuple[tuple[int, ...], float, float] | None = None
        self._looked_at = self._moved_at = time.monotonic()

    @contextmanager
    def call(self, task: str) -> Iterator[None]:
        """For the length of one call, in its thread."""
        clock = time.pthread_getcpuclockid(threading.get_ident())
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = task, clock
        try:
            yield
        finally:
            with self._lock:
                del self._calls[number]

    def look(self) -> tuple[tuple[str, ...], float | None]:
        """The calls under way, and how long none of them has got on; None with nothing under way."""
        with self._lock:
            calls = dict(self._calls)
            used = sum(time.clock_gettime(clock) for _, clock in calls.values())
        used += sum(_cpu_s(child) for child in self._process.children(recursive=True))
        now, process = time.monotonic(), time.process_time()
        seen, self._seen = self._seen, (tuple(calls), used, process)
        moved = (
            seen is None
            or not calls
            or is_waiting()
            or seen[0] != tuple(calls)
            or used - seen[1] > _CALL_CPU_S
            or process - seen[2] > _PROCESS_SHARE * (now - self._looked_at)
        )
        self._looked_at = now
        if moved:
            self._moved_at = now
        return tuple(task for task, _ in calls.values()), now - self._moved_at if calls else None


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


class Restarts:
    """How often a role's process was started in its place, on its node: a file beside its log.

    Args:
        log_path: of the role.
        max_restarts: that are allowed within the window.
        window_s: seconds.
    """

    def __init__(self, log_path: str, max_restarts: int, window_s: float) -> None:
        self._file, self._words = Path(f"{log_path}.restarts"), Path(f"{log_path}.last_words")
        self._max_restarts, self._window_s = max_restarts, window_s

    def begin(self, again: bool) -> int:
        """Note one more start; gives how many there were within the window before it, and waits the longer for it.

        Args:
            again: in place of a process that ended.

        Raises:
            RuntimeError: that are too many.
        """
        if not again:
            self._file.unlink(missing_ok=True)
            self._words.unlink(missing_ok=True)
            return 0
        now = time.time()
        times = [*(json.loads(self._file.read_text()) if self._file.exists() else []), now]
        recent = [each for each in times if 0 <= now - each <= self._window_s]
        _replace(self._file, recent)
        if len(recent) > self._max_restarts:
            raise RuntimeError(
                f"ended {len(recent)} times within {self._window_s:.0f} s; cluster.max_restarts allows "
                f"{self._max_restarts}. The last time: {self.last_words() or 'no word'}"
            )
        time.sleep(min(2.0 ** (len(recent) - 2), 30.0) if len(recent) > 1 else 0.0)
        return len(recent)

    def say(self, words: str) -> None:
        """Why this process is about to end."""
        self._words.write_text(words, encoding="utf-8")

    def last_words(self) -> str | None:
        """What the process before this one said."""
        return self._words.read_text(encoding="utf-8") if self._words.exists() else None


class Attempts:
    """How often a call was begun and ended with its process: a file beside the role's log. For one call at a time.

    Args:
        log_path: of the role.
    """

    def __init__(self, log_path: str) -> None:
        self._file = Path(f"{log_path}.call")

    @contextmanager
    def at(self, task_id: str) -> Iterator[int]:
        """For the length of one call; gives how many processes it has ended.

        Args:
            task_id: Ray's, the same at every attempt.
        """
        begun: dict[str, int] = json.loads(self._file.read_text()) if self._file.exists() else {}
        ended = begun.pop(task_id, 0)
        # Another process may be sent the calls in another order, so what it says of others stays.
        _replace(self._file, {**begun, task_id: ended + 1})
        try:
            yield ended
        finally:
            if begun:
                _replace(self._file, begun)
            else:
                self._file.unlink()


def _replace(path: Path, content: object) -> None:
    """At one stroke: this process may end at any moment, and the next one reads it."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(beside, path)
