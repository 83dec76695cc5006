"""What a role owes the driver, and every wait for it.

The driver never holds data, only an `Answer`: the reference to what a role will return, and who owes it. An answer can
be handed to another role in place of the value (it is a `Deferred` value, fetched where it is used), or waited for with
`collect`, which has a deadline and says who did not answer, where, and to what.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import ray

from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.waiting import waiting

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Deferred(Generic[T_co]):
    """Stands for a value that will exist in the process that uses it."""


@dataclass(frozen=True)
class Answer(Deferred[T_co]):
    """What one call of a role will return.

    Attributes:
        reference: of the value, in the object store.
        role, node: who owes it, and where.
        task: the role's method.
    """

    reference: ray.ObjectRef
    role: str
    node: str
    task: str


@dataclass(frozen=True)
class Stored(Generic[T_co]):
    """Rows or a column that a role keeps in the object store for other roles, and the header that the driver may read.

    Attributes:
        data: handed on, never fetched by the driver.
        header: the data's own `header()`.
    """

    data: Answer[T_co]
    header: Answer[Any]


@dataclass(frozen=True)
class Assembly(Deferred[T_co]):
    """A value that is put together where it is used.

    Args:
        make: a class or function.
        fields: keyword arguments; deferred ones are fetched first.
    """

    make: Callable[..., T_co]
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AllOf(Deferred[list[T_co]]):
    """Several deferred values as a list."""

    items: tuple[Deferred[T_co], ...]


@dataclass(frozen=True)
class OneByOne(Deferred[Iterable[T_co]]):
    """Several answers, each of which is fetched when an iteration gets there, so that one is held at a time."""

    items: tuple[Answer[T_co], ...]


def fetched(value: Any, timeout_s: float) -> Any:
    """A call's argument as the role sees it: deferred values are fetched or put together.

    Args:
        timeout_s: how long each reference may take to arrive.
    """
    if isinstance(value, Answer):
        return ray.get(value.reference, timeout=timeout_s)
    if isinstance(value, Assembly):
        return value.make(**{name: fetched(part, timeout_s) for name, part in value.fields.items()})
    if isinstance(value, AllOf):
        return [fetched(item, timeout_s) for item in value.items]
    if isinstance(value, OneByOne):
        return _Fetching(value.items, timeout_s)
    return value


@dataclass(frozen=True)
class _Fetching(Iterable[Any]):
    """What `OneByOne` becomes; every iteration fetches anew."""

    items: tuple[Answer[Any], ...]
    timeout_s: float

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            with waiting():
                value = ray.get(item.reference, timeout=self.timeout_s)
            yield value
            del value


def collect(
    answers: Sequence[Answer[T]], timeout_s: float, arrived: Callable[[Answer[T]], None] | None = None
) -> list[T]:
    """The values, in the order asked for.

    The first failure ends the wait at once, whoever else is still busy.

    Args:
        timeout_s: for all of them together.
        arrived: told of each answer as it comes in.

    Raises:
        RoleFailure: of the role that failed, died, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {answer.reference: answer for answer in answers}
    values: dict[ray.ObjectRef, T] = {}
    # Each says once that it is there. `ray.wait` looks at all of them again for each: their number squared.
    there: queue.SimpleQueue[ray.ObjectRef] = queue.SimpleQueue()
    for reference in waiting:
        reference.future().add_done_callback(partial(_announce, there, reference))
    while waiting:
        try:
            answer = waiting.pop(there.get(timeout=max(deadline - time.monotonic(), 0.0)))
        except queue.Empty:
            late = ", ".join(f"{answer.role} ({answer.task})" for answer in waiting.values())
            first = next(iter(waiting.values()))
            raise RoleFailure(
                FailureKind.INFRASTRUCTURE, first.role, first.node, f"no answer within {timeout_s:.0f} s from {late}"
            ) from None
        values[answer.reference] = fetch(answer, max(deadline - time.monotonic(), 1.0))
        if arrived is not None:
            arrived(answer)
    return [values[answer.reference] for answer in answers]


def _announce(there: queue.SimpleQueue[ray.ObjectRef], reference: ray.ObjectRef, done: object) -> None:
    there.put(reference)


def fetch(answer: Answer[T], timeout_s: float) -> T:
    """An answer that is there (here or on another node), or the failure that took its place."""
    try:
        return ray.get(answer.reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise RoleFailure(
            FailureKind.INFRASTRUCTURE,
            answer.role,
            answer.node,
            f"the answer to '{answer.task}' did not arrive within {timeout_s:.0f} s",
        ) from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RoleFailure):
            raise cause from None
        raise RoleFailure(
            FailureKind.FATAL,
            answer.role,
            answer.node,
            f"{answer.task}: {str(cause).strip() or type(cause).__name__}".splitlines()[-1],
            str(error),
        ) from None
    except ray.exceptions.RaySystemError as error:
        # The answer is here and cannot be read by this process: asking again would not help.
        cause = error.client_exc
        raise RoleFailure(
            FailureKind.FATAL,
            answer.role,
            answer.node,
            f"the answer to '{answer.task}' cannot be read: {type(cause).__name__}: {cause}",
            str(error),
        ) from None
    except ray.exceptions.RayError as error:
        raise RoleFailure(
            FailureKind.INFRASTRUCTURE,
            answer.role,
            answer.node,
            f"the process went away during '{answer.task}': {reason_of(error)}",
            str(error),
        ) from None


def reason_of(error: ray.exceptions.RayError) -> str:
    """What Ray says of a process that is gone, without the ids around it."""
    text = " ".join(str(error).split())
    if "error raised in its creation task" in text:
        # The last line of a traceback: the role's own words.
        return str(error).strip().splitlines()[-1][:400]
    _, found, why = text.partition("The actor is dead because ")
    return (why if found else text)[:400]
