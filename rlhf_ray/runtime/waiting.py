"""Every wait on actors: with a deadline, and with a message that says who did not answer, where, and to what."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_ray.failures import FailureKind, RoleFailure


@dataclass(frozen=True)
class Pending:
    """A reference that is waited for, and whose answer it is."""

    reference: ray.ObjectRef
    role: str
    node: str
    task: str


def collect(pending: Sequence[Pending], timeout_s: float) -> list[Any]:
    """The answers, in the order asked for.

    The first failure ends the wait at once, whoever else is still busy.

    Raises:
        RoleFailure: of the role that failed, died, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {item.reference: item for item in pending}
    answers: dict[ray.ObjectRef, Any] = {}
    while waiting:
        left = max(deadline - time.monotonic(), 0.0)
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left, fetch_local=False)
        if not ready:
            late = ", ".join(f"{item.role} ({item.task})" for item in waiting.values())
            first = next(iter(waiting.values()))
            raise RoleFailure(
                FailureKind.INFRASTRUCTURE, first.role, first.node, f"no answer within {timeout_s:.0f} s from {late}"
            )
        item = waiting.pop(ready[0])
        answers[item.reference] = fetch(item, max(deadline - time.monotonic(), 1.0))
    return [answers[item.reference] for item in pending]


def fetch(item: Pending, timeout_s: float) -> Any:
    """An answer that is there (here or on another node), or the failure that took its place."""
    try:
        return ray.get(item.reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise RoleFailure(
            FailureKind.INFRASTRUCTURE,
            item.role,
            item.node,
            f"the answer to '{item.task}' did not arrive within {timeout_s:.0f} s",
        ) from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RoleFailure):
            raise cause from None
        raise RoleFailure(
            FailureKind.FATAL,
            item.role,
            item.node,
            f"{item.task}: {str(cause).strip() or type(cause).__name__}".splitlines()[-1],
            str(error),
        ) from None
    except ray.exceptions.RaySystemError as error:
        # The answer is here and cannot be read by this process: asking again would not help.
        cause = error.client_exc
        raise RoleFailure(
            FailureKind.FATAL,
            item.role,
            item.node,
            f"the answer to '{item.task}' cannot be read: {type(cause).__name__}: {cause}",
            str(error),
        ) from None
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise RoleFailure(
            FailureKind.INFRASTRUCTURE,
            item.role,
            item.node,
            f"the process went away during '{item.task}': {reason[:400]}",
        ) from None
