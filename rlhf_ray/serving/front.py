"""What happens to every request before and after its protocol: identity, token, size, time, and no naked exception.

Plain ASGI, around the application: the frameworks' own middleware costs more than a request here takes.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rlhf_ray.serving.auth import is_authorized
from rlhf_ray.serving.context import REQUEST, RequestContext
from rlhf_ray.serving.errors import ApiError, ErrorType
from rlhf_ray.serving.observations import Observer
from rlhf_ray.serving.wire import error_response, family_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/health/ready"})
"""Answered without the token: probes of schedulers bring none."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_STATUS_TYPES = {400: ErrorType.BAD_REQUEST, 404: ErrorType.NOT_FOUND, 405: ErrorType.NOT_FOUND} | {
    401: ErrorType.UNAUTHORIZED,
    413: ErrorType.TOO_LARGE,
    422: ErrorType.BAD_REQUEST,
    424: ErrorType.UNSCORABLE,
    429: ErrorType.OVERLOADED,
    503: ErrorType.OVERLOADED,
    504: ErrorType.DEADLINE,
}

logger = logging.getLogger(__name__)


class Front:
    """The outermost layer of a replica.

    Args:
        application: the protocols.
        observer: told of every request.
        token: that requests must bring; None lets everybody in.
        max_body_bytes: of a request.
    """

    def __init__(self, application: Application, observer: Observer, token: str | None, max_body_bytes: int) -> None:
        self._application = application
        self._observer = observer
        self._token = token
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or one of the server's own events."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        context = RequestContext(request_id, family_of(scope["path"]))
        held = REQUEST.set(context)
        answer = _Answer(send, context)
        try:
            self._check(scope["path"], headers)
            await self._application(scope, _Limited(receive, self._max_body_bytes), answer)
        except ApiError as error:
            await self._refuse(error, scope, receive, answer)
        except Exception:
            logger.exception("request %s to %s failed", request_id, scope["path"])
            fault = ApiError(ErrorType.INTERNAL, f"a fault of the service; its log knows request {request_id}")
            await self._refuse(fault, scope, receive, answer)
        finally:
            REQUEST.reset(held)
            if answer.status and scope["path"] not in OPEN_PATHS:
                elapsed = time.perf_counter() - context.started
                kind = _STATUS_TYPES.get(answer.status, ErrorType.INTERNAL) if answer.status >= 400 else None
                self._observer.finished(context, answer.status, elapsed, kind)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        closed = self._token is not None and path not in OPEN_PATHS
        if closed and not is_authorized(headers.get(b"authorization"), self._token or ""):
            raise ApiError(ErrorType.UNAUTHORIZED, "the service's token is needed: Authorization: Bearer TOKEN")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise _too_many_bytes(self._max_body_bytes)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if answer.status:
            return
        response = error_response(scope["path"], error)
        if error.type is ErrorType.UNAUTHORIZED:
            # Browsers ask for it, and hand it on with every call of the page.
            response.headers["WWW-Authenticate"] = 'Basic realm="reward service, the password is the token"'
        await response(scope, receive, answer)


class _Limited:
    """The body as it comes in, and no more of it than a request may have."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._bytes = receive, most, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            raise _too_many_bytes(self._most)
        return message


class _Answer:
    """The answer as it goes out, with its time in the headers; Serve itself puts the request's id there."""

    def __init__(self, send: Send, context: RequestContext) -> None:
        self._send, self._context = send, context
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            elapsed_ms = (time.perf_counter() - self._context.started) * 1000
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-total-time", f"{elapsed_ms:.3f}".encode()),
            ]
        await self._send(message)


def _too_many_bytes(most: int) -> ApiError:
    return ApiError(ErrorType.TOO_LARGE, f"the body is larger than {most} bytes")
