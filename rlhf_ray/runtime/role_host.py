"""The actor around a role. It gives the role a log file, threads and inputs; the role knows nothing of Ray."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.failures import FailureKind, RoleFailure, classify, is_of_this_machine
from rlhf_ray.runtime.answers import fetched
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.runtime.vitals import Attempts, CallClock, Pulse, Restarts

EXIT_AGAIN = 75
"""Status of a process that ends so that Ray starts another in its place (`EX_TEMPFAIL`)."""

_MAX_ENDED = 2
"""Processes that one call may end before its input is taken for the cause, where the role can set an input aside."""


@dataclass(frozen=True)
class Span:
    """One call of a role.

    Attributes:
        task: the method.
        start_s: seconds since the epoch, to lay the processes' calls beside each other.
        duration_s: how long it took, whatever became of the clock meanwhile.
        cpu_s: core-seconds that the process used in between, for whatever it was doing.
    """

    task: str
    start_s: float
    duration_s: float
    cpu_s: float


@dataclass(frozen=True)
class Activity:
    """What a process did in a while.

    Attributes:
        spans: its calls.
        cpu_s: core-seconds that it used in all.
    """

    spans: tuple[Span, ...]
    cpu_s: float


@dataclass(frozen=True)
class Place:
    """Where a process is: address and id of its node, and its process id there."""

    node: str
    node_id: str
    pid: int


class RoleHost:
    """Hosts one role.

    Args:
        name: role and replica, `generator-1`.
        log_path: where everything that the process prints goes.
        threads: compute threads of this process.
        limits: how long a reference may take to arrive, and how often Ray may start this process again.
        remake: the role's constructor, where Ray may; the role then keeps nothing between calls.
        overlapping: calls with the same references may overlap; those of the call that began last are then held.
    """

    def __init__(
        self,
        name: str,
        log_path: str,
        threads: int,
        limits: Limits,
        remake: Callable[[], Any] | None = None,
        overlapping: bool = False,
    ) -> None:
        self._name, self._limits, self._remake, self._overlapping = name, limits, remake, overlapping
        self._latest: tuple[Any, ...] = ()
        self._role: Any = None
        self._building = threading.Lock()
        self._clock = CallClock()
        self._spans: list[Span] = []
        self._cpu_s = 0.0
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        # Engines print from C++ as well, so the descriptors themselves are turned.
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self._restarts = Restarts(log_path, limits.max_restarts, limits.restart_window_s)
        self._attempts = Attempts(log_path)
        self._started = 1 + self._restarts.begin(remake is not None and _is_started_again())
        import torch

        torch.set_num_threads(threads)

    def place(self) -> Place:
        """Where this process is."""
        return Place(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), os.getpid())

    def free_port(self) -> int:
        """A port of this node that nothing listens on."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])

    def build(self, role: Callable[[], Any]) -> None:
        """Build the role; one that was there before is gone first, with its memory."""
        with self._building:
            self._role = None
            gc.collect()
            self._role = self._guarded("loading its model", role)

    def call(self, method: str, *args: Any) -> Any:
        """One method of the role; deferred arguments are fetched first."""
        # Ray 2.60 forgets that an object is there if a process's last reference to it goes at the moment when another
        # call brings one, and `ray.get` then waits for nothing.
        self._latest = args if self._overlapping else ()
        if self._role is None and self._remake is not None:
            self._build_again(self._remake)
        arguments = self._fetched(args)
        set_aside: Callable[..., Any] | None = getattr(self._role, "set_aside", None)
        if set_aside is None or self._remake is None:
            return self._guarded(method, lambda: getattr(self._role, method)(*arguments))
        with self._attempts.at(ray.get_runtime_context().get_task_id() or "") as ended:
            if ended >= _MAX_ENDED:
                return set_aside(*arguments, f"its process ended {ended} times while it was at this shard")
            return self._guarded(method, lambda: getattr(self._role, method)(*arguments))

    def keep(self, method: str, *args: Any) -> tuple[Any, Any]:
        """As `call`, for rows and columns: the value, and its header apart from it."""
        value = self.call(method, *args)
        return value, value.header()

    def activity(self) -> Activity:
        """What happened since this was last asked."""
        spans, self._spans = self._spans, []
        before, self._cpu_s = self._cpu_s, time.process_time()
        return Activity(tuple(spans), self._cpu_s - before)

    def pulse(self) -> Pulse:
        """Signs of life; asked for again and again, by one asker."""
        place, (doing, stuck_s) = self.place(), self._clock.look()
        return Pulse(place.pid, place.node_id, place.node, self._started, doing, stuck_s, self._restarts.last_words())

    def _build_again(self, remake: Callable[[], Any]) -> None:
        with self._building:
            if self._role is None:
                self._role = self._guarded("loading its model again", remake)

    def _fetched(self, args: tuple[Any, ...]) -> list[Any]:
        try:
            return [fetched(argument, self._limits.call_s) for argument in args]
        except ray.exceptions.RayError as error:
            raise self._from_elsewhere(error) from None

    def _guarded(self, task: str, action: Callable[[], Any]) -> Any:
        """Run, and classify what goes wrong here, where it is still known what it was."""
        started, began, cpu_before = time.time(), time.monotonic(), time.process_time()
        try:
            with self._clock.call(task):
                return action()
        except ray.exceptions.RayError as error:
            raise self._from_elsewhere(error) from None
        except Exception as error:
            details = traceback.format_exc()
            print(details, file=sys.stderr, flush=True)
            kind = classify(error)
            cause = error.cause if isinstance(error, RoleFailure) else f"{type(error).__name__}: {_first_line(error)}"
            if is_of_this_machine(error) and self._remake is not None:
                # A new process does the same work once more.
                self._restarts.say(f"{task}: {cause}")
                os._exit(EXIT_AGAIN)
            guard = error.guard if isinstance(error, RoleFailure) else ""
            raise self._failure(kind, cause, details, guard) from None
        finally:
            self._spans.append(Span(task, started, time.monotonic() - began, time.process_time() - cpu_before))

    def _from_elsewhere(self, error: ray.exceptions.RayError) -> RoleFailure:
        """Something that was fetched is not there; another role's failure keeps that role's name."""
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, RoleFailure) else self._failure(classify(cause), _first_line(error), "")
        return self._failure(FailureKind.INFRASTRUCTURE, _first_line(error), str(error))

    def _failure(self, kind: FailureKind, cause: str, details: str, guard: str = "") -> RoleFailure:
        return RoleFailure(kind, self._name, ray.util.get_node_ip_address(), cause, details, guard)


def _is_started_again() -> bool:
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
