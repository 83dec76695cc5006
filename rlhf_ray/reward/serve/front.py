"""What happens to every request before and after its protocol: identity, token, size, time, and no naked exception.

Plain ASGI, and in front of Serve's own handling of requests in the replica, not behind it: Serve reads a body as fast
as it comes, whether anybody asks for it or not, keeps what it has read without a limit, and decodes headers that need
not be text. Here a body is read while there is room for it, and a request that is refused is never read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from rlhf_ray.config.serving import LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.auth import Callers
from rlhf_ray.reward.serve.context import REQUEST, RequestContext
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.wire import error_response, family_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/health/ready", "/livez", "/readyz"})
"""Answered without the token: probes of schedulers bring none."""
MIDDLEWARE_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Where Serve learns what to put in front of a replica's requests; `MIDDLEWARE` is ours."""
MIDDLEWARE = f"{__name__}:middleware"
_SERVE_PATHS = frozenset({"/-/healthz", "/-/routes"})
"""Serve's own, which HAProxy asks."""
_SERVE_HEADERS = frozenset(
    {b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id"}
)
"""With which clients would give Serve orders."""
_DECODED_HEADERS = frozenset({b"traceparent", b"tracestate", b"x-session-id"})
"""Which Serve decodes, and fails at where they are no text."""
_PASSED = "rlhf_ray.passed"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})
_SMALL_BODY = 1 << 16
"""What a connection may still bring after its request was refused, and go on."""

logger = logging.getLogger(__name__)


class Front:
    """The outermost layer of a replica.

    Args:
        observer: told of every request.
        callers: whose tokens requests must bring; where there are none, everybody of this machine is let in.
        limits: of bodies, and of requests at the same time.
    """

    def __init__(self, observer: Observer, callers: Callers, limits: LimitSettings) -> None:
        self._observer = observer
        self._callers = callers
        self._limits = limits
        self._requests = 0
        self._held_bytes = 0

    async def pass_on(self, application: Application, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or one of the server's own events; a second time it passes as it is."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http" or scope.get(_PASSED) or scope["path"] in _SERVE_PATHS:
            await application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        context = RequestContext(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, family_of(scope["path"]))
        kept = [(name, value) for name, value in scope["headers"] if _is_passed(name.replace(b"_", b"-"), value)]
        scope = {**scope, _PASSED: True, "headers": [*kept, (b"x-request-id", context.request_id.encode())]}
        held = REQUEST.set(context)
        answer = _Answer(send, context, _may_bring_much(headers))
        try:
            self._check(scope["path"], headers, context)
            if scope["path"] in OPEN_PATHS or scope["method"] in _WITHOUT_BODY:
                await application(scope, _Body(b""), answer)
            else:
                with context.caller.holding(1, self._limits.retry_after_s):
                    await self._admit(application, scope, receive, answer)
        except ApiError as error:
            await self._refuse(error, scope, answer)
        except Exception:
            logger.exception("request %s to %s failed", context.request_id, scope["path"])
            fault = f"a fault of the service; its log knows request {context.request_id}"
            await self._refuse(ApiError(ErrorType.INTERNAL, fault), scope, answer)
        finally:
            REQUEST.reset(held)
            if answer.status and scope["path"] not in OPEN_PATHS:
                elapsed = time.perf_counter() - context.started
                self._observer.finished(context, answer.status, elapsed)

    def _check(self, path: str, headers: dict[bytes, bytes], context: RequestContext) -> None:
        if path not in OPEN_PATHS:
            if not self._callers.is_open:
                caller = self._callers.find(headers.get(b"authorization"))
                if caller is None:
                    raise ApiError(ErrorType.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN")
                context.caller = caller
            else:
                _check_browser(headers)
        if _length(headers) > self._limits.max_body_bytes:
            raise self._too_many_bytes()

    async def _admit(self, application: Application, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """A request with a body, if there is room for one more."""
        if self._requests >= self._limits.max_queued_requests:
            raise self._overloaded(f"{self._requests} requests wait; at most {self._limits.max_queued_requests} may")
        self._requests += 1
        body = bytearray()
        try:
            if await self._read(receive, body):
                answer.closes = False
                await application(scope, _Body(bytes(body), receive), answer)
        finally:
            self._requests -= 1
            self._held_bytes -= len(body)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Read a body; False where the client went away.

        Raises:
            ApiError: it is too large, there is no room, or it does not come in time.
        """
        limits = self._limits
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    if len(body) + len(part) > limits.max_body_bytes:
                        raise self._too_many_bytes()
                    if self._held_bytes + len(part) > limits.max_held_bytes:
                        raise self._overloaded(f"the bodies of waiting requests have {limits.max_held_bytes} bytes")
                    self._held_bytes += len(part)
                    body += part
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise ApiError(ErrorType.DEADLINE, f"the body did not arrive within {limits.body_timeout_s:g} s") from None

    async def _refuse(self, error: ApiError, scope: Scope, answer: _Answer) -> None:
        if answer.status:
            return
        response = error_response(scope["path"], error)
        if error.type is ErrorType.UNAUTHORIZED:
            # Browsers ask for it, and hand it on with every call of the page.
            response.headers["WWW-Authenticate"] = 'Basic realm="reward service, the password is the token"'
        await response(scope, _Body(b""), answer)

    def _overloaded(self, message: str) -> ApiError:
        return ApiError(ErrorType.OVERLOADED, message, retry_after_s=self._limits.retry_after_s)

    def _too_many_bytes(self) -> ApiError:
        return ApiError(ErrorType.TOO_LARGE, f"the body is larger than {self._limits.max_body_bytes} bytes")


def _is_passed(name: bytes, value: bytes) -> bool:
    return name not in _SERVE_HEADERS and (name not in _DECODED_HEADERS or value.isascii())


def _check_browser(headers: dict[bytes, bytes]) -> None:
    """Without a token: see that no page of another site made a browser send this.

    Raises:
        ApiError: one may have.
    """
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    if not is_local(host):
        raise ApiError(ErrorType.BAD_REQUEST, "Host: without a token only localhost and addresses of this machine")
    # Browsers say which page asks, also where the page may not read the answer.
    if origin and origin.partition("://")[2] != host:
        raise ApiError(ErrorType.BAD_REQUEST, "Origin: without a token only the service's own page may ask")


class Fronted:
    """An application behind a front."""

    def __init__(self, app: Application, front: Front) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or one of the server's own events."""
        await self._front.pass_on(self._app, scope, receive, send)


_of_this_process: list[Front] = []


def put_in_front(front: Front) -> None:
    """Have Serve put it in front of the replica of this process; before the replica's server starts."""
    _of_this_process[:] = [front]


def middleware() -> list[Middleware]:
    """What Serve asks for (see `MIDDLEWARE_VARIABLE`)."""
    return [Middleware(Fronted, front) for front in _of_this_process]


def is_local(host: str) -> bool:
    """Whether a `Host` header is one that no foreign name server can have led a browser to: localhost, or an address.
    A page of another site whose name was made to point here brings that name."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Body:
    """A body that was read, and then the end of the connection: of `receive`, or never."""

    def __init__(self, body: bytes, receive: Receive | None = None) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._receive is not None:
            return await self._receive()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody fulfils it")


class _Answer:
    """The answer as it goes out, with its time and id in the headers.

    Attributes:
        status: once it has begun.
        closes: whether the connection ends with it, because the rest of the request is not read.
    """

    def __init__(self, send: Send, context: RequestContext, closes: bool) -> None:
        self._send, self._context = send, context
        self.status = 0
        self.closes = closes

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            elapsed_ms = (time.perf_counter() - self._context.started) * 1000
            headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"x-request-id"]
            headers.append((b"x-request-id", self._context.request_id.encode()))
            headers.append((b"x-total-time", f"{elapsed_ms:.3f}".encode()))
            if self.closes:
                headers.append((b"connection", b"close"))
            message["headers"] = headers
        await self._send(message)


def _length(headers: dict[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"0")
    # Python reads no more than a few thousand digits.
    return int(length[:20]) if length.isdigit() else 0


def _may_bring_much(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or _length(headers) > _SMALL_BODY
