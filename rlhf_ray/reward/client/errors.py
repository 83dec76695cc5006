"""Why a client of the reward service has no score: the service's own error types as exceptions, and three more.

`may_pass` says whether the same request can succeed later. What the fleet is to blame for is a `ConnectionError` or a
`TimeoutError` as well, which `rlhf_ray.failures.classify` takes for an infrastructure failure.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from rlhf_ray.reward.client.service_errors import ErrorType


class RewardServiceError(Exception):
    """No scores.

    Args:
        message: a sentence.
        request_id: of the request, the same in the service's log; empty where none was sent.
        status: HTTP status, or None where there was no answer.
        index: which item of the call, where it is one.
        retry_after_s: when the service wants to be asked again.
    """

    type: ClassVar[ErrorType | None] = None
    may_pass: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        request_id: str = "",
        status: int | None = None,
        index: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.message, self.request_id, self.status = message, request_id, status
        self.index, self.retry_after_s = index, retry_after_s
        super().__init__(message)

    def __str__(self) -> str:
        parts = [f"HTTP {self.status}"] if self.status is not None else []
        parts += [f"item {self.index}"] if self.index is not None else []
        parts += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.message} ({', '.join(parts)})" if parts else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.request_id, self.status, self.index, self.retry_after_s)


class BadRequest(RewardServiceError):
    """The service does not understand what was sent."""

    type = ErrorType.BAD_REQUEST


class Unauthorized(RewardServiceError):
    """No token, or a wrong one."""

    type = ErrorType.UNAUTHORIZED


class NotFound(RewardServiceError):
    """No such model, or no such service at this address."""

    type = ErrorType.NOT_FOUND


class TooLarge(RewardServiceError):
    """A single item is more than a request may be; a batch that is too large is sent in smaller ones."""

    type = ErrorType.TOO_LARGE


class Unscorable(RewardServiceError):
    """The item with this index cannot be scored, here or elsewhere."""

    type = ErrorType.UNSCORABLE


class Overloaded(RewardServiceError, ConnectionError):
    """Too many requests wait, or too many of this caller's texts."""

    type, may_pass = ErrorType.OVERLOADED, True


class Unavailable(RewardServiceError, ConnectionError):
    """The service is starting or stopping, or lost the replica that had the request."""

    type, may_pass = ErrorType.UNAVAILABLE, True


class DeadlineExceeded(RewardServiceError, TimeoutError):
    """No answer in time."""

    type, may_pass = ErrorType.DEADLINE, True


class ServiceFault(RewardServiceError):
    """A fault of the service; its log knows more under the request's id."""

    type = ErrorType.INTERNAL


class Unreachable(RewardServiceError, ConnectionError):
    """The connection was refused or broke."""

    may_pass = True


class InvalidAnswer(RewardServiceError):
    """The answer is not one of this API: a score is missing or not a finite number, or the count is wrong."""


class VersionChanged(RewardServiceError, ConnectionError):
    """The model of the service changed while a batch was scored, and again while that was repeated."""


_KINDS: dict[ErrorType, type[RewardServiceError]] = {
    ErrorType.BAD_REQUEST: BadRequest,
    ErrorType.UNAUTHORIZED: Unauthorized,
    ErrorType.NOT_FOUND: NotFound,
    ErrorType.TOO_LARGE: TooLarge,
    ErrorType.UNSCORABLE: Unscorable,
    ErrorType.OVERLOADED: Overloaded,
    ErrorType.OVER_LIMIT: Overloaded,
    ErrorType.UNAVAILABLE: Unavailable,
    ErrorType.DEADLINE: DeadlineExceeded,
    ErrorType.INTERNAL: ServiceFault,
}
_UNTYPED: dict[int, type[RewardServiceError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    413: TooLarge,
    429: Overloaded,
    504: DeadlineExceeded,
}


class _Error(BaseModel):
    type: ErrorType
    message: str
    index: int | None = None


class _Envelope(BaseModel):
    error: _Error


def error_of_answer(status: int, retry_after: str | None, content: bytes, request_id: str) -> RewardServiceError:
    """The exception for an answer that is not 200.

    A 5xx without the service's envelope comes from a proxy before it, mostly because a replica died with the request:
    that may pass.

    Args:
        retry_after: the header; a date in it is not read.
    """
    wait_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    try:
        error = _Envelope.model_validate_json(content).error
    except ValidationError:
        otherwise = Unavailable if status >= 500 else BadRequest if status >= 400 else InvalidAnswer
        kind = _UNTYPED.get(status, otherwise)
        return kind("the answer is not one of a reward service", request_id, status, None, wait_s)
    return _KINDS[error.type](error.message, request_id, status, error.index, wait_s)
