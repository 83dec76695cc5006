"""The actor around a role. It gives the role a log file, threads and inputs; the role knows nothing of Ray."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.failures import RoleFailure, classify


@dataclass(frozen=True)
class Assemble:
    """An argument that is made where it is used: a class and the references of its fields."""

    cls: Callable[..., Any]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OneByOne:
    """An argument that is an iterator over references, fetched as they are used."""

    references: tuple[ray.ObjectRef, ...]


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

    def build(self, cls: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Make the role; one that was there before is gone first, with its memory."""
        self._role = None
        gc.collect()
        self._role = self._guarded(lambda: cls(*args, **kwargs))

    def call(self, method: str, *args: Any) -> Any:
        """One method of the role; references inside lists and `Assemble` are fetched first."""
        return self._guarded(lambda: getattr(self._role, method)(*(self._fetched(argument) for argument in args)))

    def parts(self, method: str, *args: Any) -> list[Any]:
        """One method: what it returns, a list in its parts, and an acknowledgement that can be waited for."""
        result = self.call(method, *args)
        return [*(result if isinstance(result, list) else [result]), True]

    def stream(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        """What an iterating method yields, each put into the object store as it comes."""

        def run() -> list[ray.ObjectRef]:
            values = getattr(self._role, method)(*(self._fetched(argument) for argument in args))
            return [ray.put(value) for value in values]

        return self._guarded(run)

    def _fetched(self, value: Any) -> Any:
        if isinstance(value, ray.ObjectRef):
            return ray.get(value, timeout=self._fetch_timeout_s)
        if isinstance(value, OneByOne):
            return self._one_by_one(value.references)
        if isinstance(value, Assemble):
            return value.cls(**{name: self._fetched(part) for name, part in value.fields.items()})
        if isinstance(value, list):
            return [self._fetched(part) for part in value]
        return value

    def _one_by_one(self, references: tuple[ray.ObjectRef, ...]) -> Iterator[Any]:
        for reference in references:
            yield ray.get(reference, timeout=self._fetch_timeout_s)

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
            raise RoleFailure(_kind(error), self._name, self.node(), cause, details) from None


def _kind(error: Exception) -> Any:
    if isinstance(
        error, ray.exceptions.GetTimeoutError | ray.exceptions.ObjectLostError | ray.exceptions.RayActorError
    ):
        return classify(TimeoutError())
    return classify(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
