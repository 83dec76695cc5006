"""Failure is one of three things, and the place where it happens says which.

*Infrastructure*: an actor, node or connection went away, or a deadline passed. The prompt is fine, the
fleet is not; the same work can be sent again.
*Data*: this sample cannot be processed and another replica would fail too. It is counted and set aside.
*Fatal*: configuration, code, or a used-up budget. The run stops and says which role, node and cause.

An exception is classified before it crosses an actor boundary: behind the boundary only its text is left,
and text is not a taxonomy.
"""

from __future__ import annotations

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
    """

    def __init__(self, kind: FailureKind, role: str, node: str, cause: str, details: str = "") -> None:
        self.kind, self.role, self.node, self.cause, self.details = kind, role, node, cause, details
        super().__init__(f"{role} on {node}: {cause} ({kind.value} failure)")

    def __reduce__(self) -> tuple[type[RoleFailure], tuple[FailureKind, str, str, str, str]]:
        return RoleFailure, (self.kind, self.role, self.node, self.cause, self.details)


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


class Stopped(Exception):
    """The run was asked to stop, and has kept its state."""


def classify(error: BaseException) -> FailureKind:
    """The kind of a failure, judged where the exception was caught.

    Time-outs and broken connections are the fleet's; everything that a role raises on purpose carries its
    kind already; the rest is a defect or a wrong setting, and trying again would not help.
    """
    if isinstance(error, RoleFailure):
        return error.kind
    if isinstance(error, TimeoutError | ConnectionError | BrokenPipeError):
        return FailureKind.INFRASTRUCTURE
    return FailureKind.FATAL
