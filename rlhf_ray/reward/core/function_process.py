"""A reward function in a process of its own, seen from outside.

A function may hang, and a thread cannot be ended; it may also end the process that it is in. So it gets one, and every
call has a deadline. Whatever happens to the process, the next call finds a fresh one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.function_child import Batch, Failed, Outcome, Ready, Unusable

START_TIMEOUT_S = 120.0
"""For the interpreter to start and the function's module to be imported."""
_GRACE_S, _END_TIMEOUT_S = 2.0, 10.0
_PROGRAM = "from rlhf_ray.reward.core.function_child import main; main()"


class FunctionProcess:
    """Calls a function in a child process, which is started at once and again whenever it was lost.

    Args:
        function: `module:name`.
        search_path: folders to import from before all others.
        key: setting that names the function, for messages.
        environment: of the child, beside this process's own.
        start_timeout_s: how long it may take to import the function.
        silent: nothing that the child prints is shown.

    Attributes:
        version: the function's name and a hash of its module's file.

    Raises:
        BadInput: the function cannot be imported or called.
    """

    def __init__(
        self,
        function: str,
        search_path: Sequence[str] = (),
        key: str = "reward.function",
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        silent: bool = False,
    ) -> None:
        self._function, self._search_path, self._key = function, list(search_path), key
        self._environment, self._start_timeout_s = {**os.environ, **(environment or {})}, start_timeout_s
        self._output = subprocess.DEVNULL if silent else None
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self.version = ""
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether the process outlived the last call."""
        return self._running is not None

    def call(self, batch: Batch, timeout_s: float) -> list[Outcome]:
        """One score or cause for each sample.

        Args:
            timeout_s: for the call; a process that has to be started first has a deadline of its own.
        """
        _, connection = self._running or self._start()
        try:
            connection.send(batch)
            if connection.poll(timeout_s):
                outcomes: list[Outcome] = connection.recv()
                return outcomes
            self._end()
            cause = f"{self._name} did not return within {timeout_s:g} s"
        except (EOFError, OSError):
            cause = f"{self._name} ended its process ({_how(self._end(_GRACE_S))})"
        return [Failed(cause)] * len(batch.responses)

    def close(self) -> None:
        """End the process."""
        self._end()

    @property
    def _name(self) -> str:
        return self._function.rpartition(":")[2]

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), self._function, *self._search_path],
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                # What the function starts is in its session, and ends with it.
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        self._running = process, connection
        try:
            answer = connection.recv() if connection.poll(self._start_timeout_s) else None
        except (EOFError, OSError):
            how = _how(self._end(_GRACE_S))
            raise self._refused(f"its process ended while it was imported ({how})", "a module without that") from None
        if isinstance(answer, Ready):
            self.version = answer.version
            return self._running
        self._end()
        if isinstance(answer, Unusable):
            raise self._refused(answer.found, answer.allowed)
        raise self._refused(f"not imported within {self._start_timeout_s:g} s", "a module that is imported faster")

    def _refused(self, found: str, allowed: str) -> BadInput:
        return BadInput(self._key, f"{self._function}: {found}", allowed)

    def _end(self, grace_s: float = 0.0) -> int:
        """Kill the process and all that it started.

        Args:
            grace_s: for a process that is ending on its own, whose exit status is wanted.

        Returns:
            Its exit status, or minus the signal that ended it.
        """
        if self._running is None:
            return 0
        (process, connection), self._running = self._running, None
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait(_END_TIMEOUT_S)


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
