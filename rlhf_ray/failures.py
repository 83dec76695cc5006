"""Failure is one of three things, and the place where it happens says which.

*Infrastructure*: an actor, node or connection went away, or a deadline passed. The prompt is fine, the
fleet is not; the same work can be sent again.
*Data*: this sample cannot be processed and another replica would fail too. It is counted and set aside.
*Fatal*: configuration, code, or a used-up budget. The run stops and says which role, node and cause.

An exception is classified before it crosses an actor boundary: behind the boundary only its text is left,
and text is not a taxonomy.
"""

from __future__ import annotations

import errno
from enum import StrEnum


class FailureKind(StrEnum):
    INFRASTRUCTURE = "infrastructure"
    DATA = "data"
    FATAL = "fatal"


class BadInput(Exception):
    """The user's configuration, data or model cannot be used. Ends in exit status 2, in one line.

    Args:
        where: the key (`policy.model`) or the place in a file (`pairs.jsonl:17`).
        found: what is there.
        allowed: what would have been accepted.
    """

    def __init__(self, where: str, found: str, allowed: str) -> None:
        self.where, self.found, self.allowed = where, found, allowed
        super().__init__(f"{where}: {found}; {allowed}")

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, str, str]]:
        return type(self), (self.where, self.found, self.allowed)


class OutOfReach(BadInput):
    """What a key names may well be there, on a hub that this machine cannot reach."""


class PresetError(Exception):
    """A preset's source cannot be fetched, or is not what it should be."""


class RoleFailure(Exception):
    """A role could not do what it was asked to do.

    Args:
        kind: which of the three things this is.
        role: role and replica, `generator-1`.
        node: address of the node the actor ran on, or `?` when it is gone.
        cause: one line.
        details: the traceback on the far side, for the log.
        guard: which guard stopped the run on purpose, before harm was done; empty where nobody did.
    """

    def __init__(self, kind: FailureKind, role: str, node: str, cause: str, details: str = "", guard: str = "") -> None:
        self.kind, self.role, self.node, self.cause, self.details = kind, role, node, cause, details
        self.guard = guard
        super().__init__(f"{role} on {node}: {cause} ({kind.value} failure)")

    @property
    def group(self) -> str:
        """The role without the replica's number."""
        return self.role.rpartition("-")[0]

    def __reduce__(self) -> tuple[type[RoleFailure], tuple[FailureKind, str, str, str, str, str]]:
        return RoleFailure, (self.kind, self.role, self.node, self.cause, self.details, self.guard)


def first_sentence(cause: str) -> str:
    """Enough of a cause for whoever looks at the run; Ray's are paragraphs. Events have all of it."""
    return cause.partition(". ")[0]


class Refused(Exception):
    """A reward model that the release gate refused.

    Args:
        model: its directory.
        refusals: the reasons, a line each.
    """

    def __init__(self, model: str, refusals: tuple[str, ...]) -> None:
        self.model, self.refusals = model, refusals
        super().__init__("\n  ".join([f"'{model}' is not released:", *refusals]))

    def __reduce__(self) -> tuple[type[Refused], tuple[str, tuple[str, ...]]]:
        return Refused, (self.model, self.refusals)


class Finished(Exception):
    """A run that was to be resumed had come to its end before. Exit status 0: a job that is started again until it
    succeeds has succeeded.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        super().__init__(f"{folder} holds a finished run: nothing is left to do")

    def __reduce__(self) -> tuple[type[Finished], tuple[str]]:
        return Finished, (self.folder,)


class Stopped(Exception):
    """The run was asked to stop, and has kept its state."""


_MACHINE_ERRORS = {
    *("DistBackendError", "DistNetworkError", "DistStoreError", "OutOfMemoryError", "AcceleratorError"),
    "EngineDeadError",
}
"""Names that torch and vLLM give to a broken connection, exhausted memory and a device or worker that failed. Not
imported: clients need neither."""
_MACHINE_MARKS = ("gloo/transport", "DefaultCPUAllocator: can't allocate memory", "std::bad_alloc")
"""Where torch raises a plain RuntimeError for these."""
_MACHINE_ERRNOS = {errno.EIO, errno.ESTALE, errno.ENOMEM}


def classify(error: BaseException) -> FailureKind:
    """The kind of a failure, judged where the exception was caught.

    Time-outs, broken connections, exhausted memory and failing devices are the fleet's; everything that a role raises
    on purpose carries its kind already; the rest is a defect or a wrong setting, and trying again would not help.
    """
    if isinstance(error, RoleFailure):
        return error.kind
    if is_of_this_machine(error) or isinstance(error, TimeoutError | ConnectionError):
        return FailureKind.INFRASTRUCTURE
    return FailureKind.FATAL


def is_of_this_machine(error: BaseException) -> bool:
    """Whether memory, a device, a disk or the process group of this process failed: another process may do better."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS)
        or type(error).__name__ in _MACHINE_ERRORS
        or any(mark in str(error) for mark in _MACHINE_MARKS)
    )
