"""What happens to a request before anything reads it. Over sockets, for much of it no HTTP library would send."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from rlhf_ray.config.serving import CallerSettings, CandidateSettings, LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.auth import Callers
from rlhf_ray.reward.serve.context import RequestContext
from rlhf_ray.reward.serve.front import Front, Fronted, is_local
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.wire import error_response
from tests.loopback import serving
from tests.system.commands import wait_until

TOKEN, OTHER_TOKEN = "a-token-of-24-characters", "another-of-24-characters"
LIMITS = {"max_body_bytes": 1 << 20, "max_held_bytes": 3 << 19, "body_timeout_s": 0.5, "max_queued_requests": 2}


def callers_of(document: dict[str, Any]) -> Callers:
    return Callers(lambda: {name: CallerSettings.model_validate(each) for name, each in document.items()})


class Service:
    """An application that says what it was given, and waits where it is asked to."""

    def __init__(self, callers: Callers | None = None, **limits: Any) -> None:
        self.observer = Observer(CandidateSettings(), False)
        self.open = asyncio.Event()
        self.inside = 0
        app = FastAPI()

        @app.get("/health")
        async def health() -> str:
            return "ok"

        @app.post("/get_reward")
        async def reward(request: Request) -> dict[str, Any]:
            body = await request.body()
            self.loop = asyncio.get_running_loop()
            self.inside += 1
            if b"wait" in request.url.query.encode():
                await self.open.wait()
            return {"bytes": len(body), "headers": dict(request.headers.items())}

        @app.post("/v1/reward")
        async def unavailable(request: Request) -> Any:
            return error_response("/v1/reward", ApiError(ErrorType.UNAVAILABLE, "it starts"))

        callers = callers or callers_of({"default": {"tokens": [TOKEN]}})
        self.front = Front(self.observer, callers, LimitSettings.model_validate({**LIMITS, **limits}))
        self.app = Fronted(app, self.front)

    def wait_for_requests(self, count: int) -> None:
        """Until so many hold a place."""
        wait_until(lambda: self.front._requests == count, 10, f"{count} requests")

    def counted(self, error: ErrorType) -> float:
        return float(self.observer.metrics.counters["errors"].labels(error.value)._value.get())


AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def head(path: str, *lines: bytes, method: str = "POST") -> bytes:
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), b"Host: 127.0.0.1", *lines, b"", b""])


BEARER = f"Authorization: Bearer {TOKEN}".encode()
CHUNKED = b"Transfer-Encoding: chunked"


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """An answer that is read until the connection ends, or its body is whole."""
    data = b""
    while True:
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        data += part
        lines, _, body = data.partition(b"\r\n\r\n")
        first, *rest = lines.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        if not part or len(body) >= int(headers.get("content-length", 1 << 30)):
            return int(first.split()[1]), headers, json.loads(body)


def swallowed(connection: socket.socket, most: int) -> int:
    """How many bytes of an endless chunked body are taken before the connection is closed."""
    part = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    sent = 0
    connection.settimeout(2)
    try:
        while sent < most:
            sent += connection.send(part)
    except (ConnectionError, TimeoutError):
        pass
    return sent


@pytest.mark.parametrize(
    "line", [b"X-Request-Id: \xff", b"X-Request-Id: \xc3\xbc", b"X-Request-Id: a b", b"X-Whatever: \xff\xfe"]
)
def test_headers_that_are_no_text_are_none_of_our_business(line):
    service = Service()
    with serving(service.app) as url, connected(url) as connection:
        connection.sendall(head("/get_reward", BEARER, line, b"Content-Length: 2") + b"{}")
        status, headers, _ = answer_of(connection)
        assert (status, len(headers["x-request-id"])) == (200, 32)
    with serving(service.app) as url, connected(url) as connection:
        connection.sendall(head("/get_reward", line, b"Content-Length: 2") + b"{}")
        status, _, content = answer_of(connection)
        assert (status, content["error"]["type"]) == (401, "unauthorized")


def test_clients_give_serve_no_orders():
    given = {"X-Request-Timeout-Seconds": "0.001", "x-request-disconnect-disabled": "?1"}
    given |= {"serve_multiplexed_model_id": "x"}
    # Serve would decode it.
    no_trace = {"traceparent": b"\xff", "X-Session-Id": b"\xff", "x_session_id": b"\xc3("}
    traced = {"tracestate": "a=b", "X-Request-Id": "mine"}
    with serving(Service().app) as url:
        answer = httpx.post(f"{url}/get_reward", json={}, headers={**AUTHORIZED, **given, **no_trace, **traced})
    assert answer.headers.get_list("X-Request-Id") == ["mine"]
    assert answer.json()["headers"]["x-request-id"] == "mine"
    assert not answer.json()["headers"].keys() & {name.lower() for name in (*given, *no_trace)}
    assert answer.json()["headers"]["tracestate"] == "a=b"


@pytest.mark.parametrize(
    ("lines", "path", "status"),
    [([], "/health", 200), ([], "/get_reward", 401), ([BEARER], "/get_reward", 413), ([BEARER], "/metrics", 413)],
)
def test_an_endless_body_is_not_kept_and_ends_its_connection(lines, path, status):
    with serving(Service().app) as url, connected(url) as connection:
        connection.sendall(head(path, *lines, CHUNKED, method="GET" if path == "/health" else "POST"))
        assert swallowed(connection, 1 << 27) < 24 << 20, "the buffers of the sockets, and a body's limit"


def test_a_body_that_does_not_come_gives_its_place_up():
    service = Service(max_queued_requests=1, body_timeout_s=2)
    with serving(service.app) as url, connected(url) as slow:
        slow.sendall(head("/get_reward", BEARER, b"Content-Length: 1000") + b"{")
        service.wait_for_requests(1)
        refused = httpx.post(f"{url}/get_reward", content=b"x" * 5000, headers=AUTHORIZED)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
        assert refused.headers["Retry-After"] == "1"
        assert httpx.post(f"{url}/predict", content=b"{}", headers=AUTHORIZED).status_code == 429
        assert httpx.get(f"{url}/health").status_code == 200
        assert select.select([slow], [], [], 0)[0] == [], "all these were answered while its body was waited for"
        assert answer_of(slow)[0] == 504
        assert httpx.post(f"{url}/get_reward", content=b"{}", headers=AUTHORIZED).status_code == 200
        assert (service.counted(ErrorType.OVERLOADED), service.counted(ErrorType.DEADLINE)) == (2, 1)


def test_bodies_have_room_for_so_many_bytes_together():
    service = Service()
    big = b"x" * (1 << 20)

    async def ask(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, headers=AUTHORIZED, timeout=10) as client:
            first = asyncio.create_task(client.post("/get_reward?wait", content=big))
            await until(lambda: service.inside == 1)
            second = await client.post("/get_reward", content=big)
            assert (second.status_code, second.json()["error"]["type"]) == (503, "overloaded")
            assert (await client.post("/get_reward", content=b"{}")).status_code == 200
            service.loop.call_soon_threadsafe(service.open.set)
            assert (await first).json()["bytes"] == len(big)
            assert (await client.post("/get_reward", content=big)).status_code == 200

    with serving(service.app) as url:
        asyncio.run(ask(url))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_client_that_leaves_gives_its_place_up():
    service = Service(max_queued_requests=1, body_timeout_s=20)
    with serving(service.app) as url:
        with connected(url) as leaving:
            leaving.sendall(head("/get_reward", BEARER, b"Content-Length: 1000") + b"{")
            service.wait_for_requests(1)
        service.wait_for_requests(0)
        assert httpx.post(f"{url}/get_reward", content=b"{}", headers=AUTHORIZED).status_code == 200


def test_a_caller_over_its_limit_is_refused_unread_and_others_are_not():
    names = {"busy": OTHER_TOKEN, "calm": TOKEN}
    service = Service(
        callers_of({name: {"tokens": [token], "max_texts": 1} for name, token in names.items()}), retry_after_s=7
    )
    busy, calm = ({"Authorization": f"Bearer {token}"} for token in names.values())

    async def ask(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            first = asyncio.create_task(client.post("/get_reward?wait", content=b"{}", headers=busy))
            await until(lambda: service.inside == 1)
            for path, error in (
                ("/get_reward", {"type": "over_limit", "index": None}),
                ("/classify", {"type": "over_limit", "index": None, "param": None, "code": 429}),
            ):
                refused = await client.post(path, content=b"{}", headers=busy)
                assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
                assert refused.json()["error"].pop("message").startswith("too many texts of 'busy'")
                assert {**refused.json()["error"], "message": ""} == {**error, "message": ""}
            tei = await client.post("/predict", content=b"{}", headers=busy)
            assert (tei.status_code, tei.json()["error_type"]) == (429, "Overloaded")
            assert service.inside == 1
            assert (await client.post("/get_reward", content=b"{}", headers=calm)).status_code == 200
            service.loop.call_soon_threadsafe(service.open.set)
            assert (await first).status_code == 200
            assert (await client.post("/get_reward", content=b"{}", headers=busy)).status_code == 200

    with serving(service.app) as url:
        asyncio.run(ask(url))
        assert httpx.post(f"{url}/get_reward", content=b"{}").status_code == 401
    by_caller = {
        (sample.name, *(sample.labels[name] for name in ("caller", "type") if name in sample.labels)): sample.value
        for family in service.observer.metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("rlhf_ray_caller") and sample.name.endswith("_total")
    }
    assert by_caller == {
        ("rlhf_ray_caller_requests_total", "busy"): 5,
        ("rlhf_ray_caller_requests_total", "calm"): 1,
        ("rlhf_ray_caller_refusals_total", "busy", "over_limit"): 3,
    }


def test_metrics_have_the_type_that_was_answered():
    service = Service()
    with serving(service.app) as url:
        assert httpx.post(f"{url}/v1/reward", json={}, headers=AUTHORIZED).status_code == 503
    assert (service.counted(ErrorType.UNAVAILABLE), service.counted(ErrorType.OVERLOADED)) == (1, 0)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("localhost:8000", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("", True),
        ("evil.example", False), ("127.0.0.1.evil.example:8000", False), ("localhost.evil.example", False),
        ("evil.example@127.0.0.1", False), ("[evil]", False),
    ],
)  # fmt: skip
def test_a_name_that_another_site_could_have_made_is_no_name_of_this_machine(host, local):
    assert is_local(host) == local


def test_without_a_token_pages_of_other_sites_cannot_ask():
    with serving(Service(callers_of({})).app) as url:
        for host, status in (("evil.example", 400), ("localhost:8000", 200)):
            answer = httpx.post(f"{url}/get_reward", json={}, headers={"Host": host})
            assert answer.status_code == status
            assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == 200
        # A browser says whose page asks; an address is no secret, and a page need not read the answer to do harm.
        for origin, status in (("http://evil.example", 400), ("null", 400), ("http://localhost:8000", 200)):
            headers = {"Host": "localhost:8000", "Origin": origin}
            assert httpx.post(f"{url}/get_reward", json={}, headers=headers).status_code == status
    with serving(Service().app) as url:
        assert httpx.post(f"{url}/get_reward", json={}, headers={**AUTHORIZED, "Host": "scorer.lan"}).status_code == 200


@pytest.mark.parametrize(
    ("status", "fault"), [(499, "client_gone"), (500, "internal"), (503, "unavailable"), (200, None)]
)
def test_what_serve_answers_by_itself_is_counted_too(status, fault):
    observer = Observer(CandidateSettings(), False)
    observer.finished(RequestContext("r", "own"), status, 0.1)
    traffic = observer.take()
    assert traffic.outcomes == {"answered" if fault is None else "failed": 1}
    assert traffic.errors == ({} if fault is None else {fault: 1})
    assert traffic.latencies.sum() == (fault is None)
