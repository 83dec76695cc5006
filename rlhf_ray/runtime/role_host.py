"""The actor around a role. It gives the role a log file, threads and inputs; the role knows nothing of Ray."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.failures import RoleFailure, classify
from rlhf_ray.runtime.answers import fetched


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


class RoleHost:
    """Hosts one role.

    Args:
        name: role and replica, `generator-1`.
        log_path: where everything that the process prints goes.
        threads: compute threads of this process.
        fetch_timeout_s: how long a reference may take to arrive.
    """

    def __init__(self, name: str, log_path: str, threads: int, fetch_timeout_s: float) -> None:
        self._name = name
        self._fetch_timeout_s = fetch_timeout_s
        self._role: Any = None
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
        import torch

        torch.set_num_threads(threads)

    def node(self) -> str:
        """Address of the node this process runs on."""
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        """A port of this node that nothing listens on."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])

    def build(self, role: Callable[[], Any]) -> None:
        """Build the role; one that was there before is gone first, with its memory."""
        self._role = None
        gc.collect()
        self._role = self._guarded(role)

    def call(self, method: str, *args: Any) -> Any:
        """One method of the role; deferred arguments are fetched first."""
        return self._guarded(lambda: self._timed(method, args))

    def keep(self, method: str, *args: Any) -> tuple[Any, Any]:
        """As `call`, for rows and columns: the value, and its header apart from it."""
        value = self.call(method, *args)
        return value, value.header()

    def activity(self) -> Activity:
        """What happened since this was last asked."""
        spans, self._spans = self._spans, []
        before, self._cpu_s = self._cpu_s, time.process_time()
        return Activity(tuple(spans), self._cpu_s - before)

    def _timed(self, method: str, args: tuple[Any, ...]) -> Any:
        arguments = [fetched(argument, self._fetch_timeout_s) for argument in args]
        started, began, cpu_before = time.time(), time.monotonic(), time.process_time()
        try:
            return getattr(self._role, method)(*arguments)
        finally:
            self._spans.append(Span(method, started, time.monotonic() - began, time.process_time() - cpu_before))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Run, and classify what goes wrong here, where it is still known what it was."""
        try:
            return action()
        except ray.exceptions.RayTaskError as error:
            # What was fetched is another role's failure: it keeps that role's name.
            if isinstance(error.cause, RoleFailure):
                raise error.cause from None
            raise RoleFailure(_kind(error), self._name, self.node(), _first_line(error), str(error)) from None
        except Exception as error:
            details = traceback.format_exc()
            print(details, file=sys.stderr, flush=True)
            cause = error.cause if isinstance(error, RoleFailure) else f"{type(error).__name__}: {_first_line(error)}"
            guard = error.guard if isinstance(error, RoleFailure) else ""
            raise RoleFailure(_kind(error), self._name, self.node(), cause, details, guard) from None


def _kind(error: Exception) -> Any:
    if isinstance(
        error, ray.exceptions.GetTimeoutError | ray.exceptions.ObjectLostError | ray.exceptions.RayActorError
    ):
        return classify(TimeoutError())
    return classify(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
