"""Errors as clients see them: a status, a type to program against, and a sentence.

Each family of clients has an envelope of its own for the same error; `rlhf_ray.reward.serve.wire` writes it.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorType(StrEnum):
    """What went wrong, in one word that does not change."""

    BAD_REQUEST = "bad_request"
    """The body is not what the route takes (400; on the TEI paths 422)."""
    UNAUTHORIZED = "unauthorized"
    """No token, or a wrong one (401)."""
    NOT_FOUND = "not_found"
    """No such route or model (404)."""
    TOO_LARGE = "too_large"
    """More bytes, texts or tokens than a request may have (413)."""
    UNSCORABLE = "unscorable"
    """This text cannot be scored, here or elsewhere (422; on the TEI paths 424)."""
    OVERLOADED = "overloaded"
    """Too many requests wait; try again after `Retry-After` (503; on the TEI paths 429)."""
    OVER_LIMIT = "over_limit"
    """The caller has as many texts under way as it may; try again after `Retry-After` (429)."""
    UNAVAILABLE = "unavailable"
    """The service is starting or stopping; try again after `Retry-After` (503)."""
    DEADLINE = "deadline"
    """The request took longer than it may (504)."""
    INTERNAL = "internal"
    """A fault of the service (500). The log knows more, under the request's id."""


STATUS = {
    ErrorType.BAD_REQUEST: 400,
    ErrorType.UNAUTHORIZED: 401,
    ErrorType.NOT_FOUND: 404,
    ErrorType.TOO_LARGE: 413,
    ErrorType.UNSCORABLE: 422,
    ErrorType.OVERLOADED: 503,
    ErrorType.OVER_LIMIT: 429,
    ErrorType.UNAVAILABLE: 503,
    ErrorType.DEADLINE: 504,
    ErrorType.INTERNAL: 500,
}


class ApiError(Exception):
    """A request that gets no scores.

    Args:
        type: what went wrong.
        message: a sentence for people. Never holds a text that was to be scored.
        index: which text of the request, where it was one.
        retry_after_s: when to try again, for overload.
    """

    def __init__(
        self, type: ErrorType, message: str, *, index: int | None = None, retry_after_s: int | None = None
    ) -> None:
        self.type, self.message, self.index, self.retry_after_s = type, message, index, retry_after_s
        super().__init__(message)

    @property
    def status(self) -> int:
        """HTTP status, but for the families that have their own."""
        return STATUS[self.type]
