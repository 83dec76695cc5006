"""Roles that come to grief once, at a place that is known: in the midst of a call, or when nothing is going on."""

import errno
import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from rlhf_ray.ppo.roles import RoleClasses

METHODS = {"generator": "generate", "reward": "score", "reference": "logprobs", "policy": "train", "critic": "train"}
"""What each role is doing when it is busy."""


@dataclass(frozen=True)
class Fault:
    """What happens to one process.

    Attributes:
        role: whose.
        how: `kill`, `stop` (SIGSTOP), `raise` (a disk error), `memory` (none left) or `fill` (the object store; nothing
            else happens).
        when: `start`: before the role is built; `busy`: as the call begins; `idle`: once no call is under way
            behind it.
        call: number of the call of the role's method in this process, from 0.
        mark: made when it happens, so that it does once.
    """

    role: str
    how: str
    when: str
    call: int
    mark: str


class FaultyRole:
    """A role and its fault."""

    def __init__(self, role: Any, fault: Fault) -> None:
        self._role, self._fault = role, fault
        self._numbers = itertools.count()
        self._lock, self._busy, self._armed = threading.Lock(), 0, False
        self._kept: list[ray.ObjectRef] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._role, name)
        return partial(self._call, name, method) if callable(method) else method

    def _call(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            self._busy += 1
        due = name == METHODS[self._fault.role] and next(self._numbers) == self._fault.call
        try:
            if due and self._fault.when == "busy":
                self._kept = strike(self._fault)
            result = method(*args)
            if due and self._fault.when == "idle":
                self._armed = self._fault.how in ("kill", "stop")
                if not self._armed:
                    self._kept = strike(self._fault)
        finally:
            with self._lock:
                self._busy -= 1
        if self._armed:
            threading.Thread(target=self._strike_when_idle, daemon=True).start()
        return result

    def _strike_when_idle(self) -> None:
        pause = threading.Event()
        while not pause.wait(0.05):
            with self._lock:
                if self._busy == 0:
                    strike(self._fault)
                    return


def strike(fault: Fault) -> list[ray.ObjectRef]:
    """Do it to this process, if it was not done before; gives what has to be kept for it."""
    try:
        os.close(os.open(fault.mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return []
    if fault.how in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
    elif fault.how == "fill":
        size = int(ray.cluster_resources()["object_store_memory"])
        return [ray.put(np.zeros(size // 8, np.uint8)) for _ in range(10)]
    elif fault.how == "raise":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    else:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        np.ones(1 << 30)
    return []


def _make(constructor: Callable[..., Any], fault: Fault, *args: Any, **kwargs: Any) -> Any:
    if fault.when == "start":
        strike(fault)
        return constructor(*args, **kwargs)
    return FaultyRole(constructor(*args, **kwargs), fault)


def faulty(constructor: Callable[..., Any], role: str, faults: Sequence[Fault]) -> Callable[..., Any]:
    """The constructor of a role with its faults."""
    for fault in faults:
        if fault.role == role:
            constructor = partial(_make, constructor, fault)
    return constructor


def faulty_classes(faults: Sequence[Fault]) -> RoleClasses:
    """All roles but the scorers, which come from their source."""
    real = RoleClasses()
    return RoleClasses(
        **{role: faulty(getattr(real, role), role, faults) for role in ("generator", "policy", "critic", "reference")}
    )


def happened(faults: Sequence[Fault]) -> bool:
    """Whether each of them did."""
    return all(Path(fault.mark).exists() for fault in faults)
