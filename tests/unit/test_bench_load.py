"""The load generator, the fuzzer's judgement and what the stress benchmark makes of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web

import bench.load
from bench.fuzz_cases import SECRET, CaseMaker
from bench.load import Load, LoadGenerator, Outcome, arrivals, error_type, summarise
from bench.serve_fuzz import violation_of
from bench.serve_stress import memory_growth, mixed

Handler = Callable[[web.Request], Awaitable[web.Response]]
OVERLOADED = {"error": {"type": "overloaded", "message": "later", "index": None}}


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """A server on loopback, and its URL."""
    application = web.Application()
    application.router.add_post("/get_reward", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def load_on(handler: Handler, work: Callable[[LoadGenerator], Awaitable[Load]], token: str = "") -> Load:
    async def run() -> Load:
        async with served(handler) as url:
            return await work(LoadGenerator(url, ["a", "bb", "ccc"], token))

    return asyncio.run(run())


async def lengths(request: web.Request) -> web.Response:
    """The length of a text as its score."""
    body = await request.json()
    headers = {"X-Model-Name": "m", "X-Model-Version": "v"}
    return web.json_response({"rewards": [len(body["query"][0])]}, headers=headers)


def test_arrivals_are_a_keyed_poisson_process() -> None:
    times = np.array(arrivals(200.0, 50.0, seed=3))
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] < 50
    # Counts and gaps within five standard deviations; the gaps of an exponential are as wide as they are long.
    assert abs(len(times) - 10_000) < 500
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)
    assert arrivals(200.0, 50.0, seed=3) == times.tolist()
    assert arrivals(200.0, 50.0, seed=4) != times.tolist()


def test_each_client_waits_for_its_answer() -> None:
    under_way, most = 0, 0

    async def slow(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return await lengths(request)

    load = load_on(slow, lambda generator: generator.closed_loop(clients=4, seconds=0.3))
    assert most == 4
    assert {(each.text, each.score) for each in load.outcomes} == {(0, 1.0), (1, 2.0), (2, 3.0)}
    assert {(each.model, each.version, each.status) for each in load.outcomes} == {("m", "v", 200)}
    assert load.summary.accepted == len(load.outcomes)
    assert load.summary.p50_s >= 0.02
    assert load.summary.throughput == pytest.approx(len(load.outcomes) / load.summary.seconds)


def test_a_request_that_fails_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.load, "BETWEEN_TRIES_S", 0.01)
    calls = 0

    async def third_time(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        if calls % 3:
            return web.json_response(OVERLOADED, status=503)
        return await lengths(request)

    load = load_on(third_time, lambda generator: generator.closed_loop(clients=1, seconds=0.2))
    assert load.summary.failed == 0
    assert {each.tries for each in load.outcomes} == {3}
    assert load.summary.tries == calls
    # The pauses belong to what the client waits for.
    assert min(each.latency_s for each in load.outcomes) >= 0.02


def test_after_five_tries_an_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.load, "BETWEEN_TRIES_S", 0.01)

    async def never(request: web.Request) -> web.Response:
        return web.json_response(OVERLOADED, status=503)

    load = load_on(never, lambda generator: generator.closed_loop(clients=1, seconds=0.02))
    assert {(each.tries, each.status, each.error) for each in load.outcomes} == {(5, 503, "overloaded")}
    assert load.summary.failed == len(load.outcomes)
    assert load.summary.statuses == {"503:overloaded": len(load.outcomes)}


def test_an_open_loop_does_not_wait_and_counts_from_the_arrival() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return await lengths(request)

    load = load_on(slow, lambda generator: generator.open_loop(rate=200.0, seconds=0.3, seed=0))
    expected = arrivals(200.0, 0.3, 0)
    assert sorted(each.sent_s for each in load.outcomes) == expected
    assert min(each.latency_s for each in load.outcomes) >= 0.2
    # One after another they would take 0.2 s each.
    assert load.summary.seconds < 0.2 * len(expected) / 4


def test_the_token_goes_along() -> None:
    seen = set()

    async def handler(request: web.Request) -> web.Response:
        seen.add(request.headers.get("Authorization"))
        return await lengths(request)

    load_on(handler, lambda generator: generator.closed_loop(clients=1, seconds=0.02), token="abc")
    assert seen == {"Bearer abc"}


def test_only_answers_with_a_score_have_a_latency() -> None:
    accepted = [Outcome(0, 0.0, latency, 200, score=1.0) for latency in (1.0, 2.0, 3.0)]
    refused = [Outcome(0, 0.0, 0.001, 503, "overloaded"), Outcome(0, 0.0, 9.0, 0, "TimeoutError")]
    summary = summarise([*accepted, *refused], seconds=10.0, cpu_s=1.0)
    assert (summary.accepted, summary.failed, summary.p50_s) == (3, 2, 2.0)
    assert summary.throughput == pytest.approx(0.3)
    assert summary.statuses == {"0:TimeoutError": 1, "200": 3, "503:overloaded": 1}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {"type": 3}}', b"[" * 100_000])
def test_an_error_without_a_type_is_untyped(body: bytes) -> None:
    assert error_type(body) == "untyped"


def test_a_score_of_another_version_is_found() -> None:
    expected = {"v1": np.array([1.0, 2.0]), "v2": np.array([3.0, 4.0])}

    def outcome(text: int, version: str, score: float | None) -> Outcome:
        return Outcome(text, 0.0, 0.1, 200, version=version, score=score)

    right = [outcome(0, "v1", 1.0), outcome(1, "v2", 4.0), outcome(1, "v2", None)]
    assert mixed(right, expected) == 0
    assert mixed([*right, outcome(0, "v1", 3.0), outcome(0, "v3", 1.0)], expected) == 2


def test_memory_that_is_taken_at_the_start_is_no_growth() -> None:
    assert memory_growth([100, 200, *[400] * 8]) == pytest.approx(0)
    assert memory_growth([400, 400, *range(400, 800, 50)]) > 0.5


TYPED = json.dumps({"error": {"type": "bad_request", "message": "no", "index": None}}).encode()
TEI = json.dumps({"error": "no", "error_type": "Validation"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "typed", "rule"),
    [
        (200, b'{"rewards": [1.0]}', True, ""),
        (200, b'{"rewards": [NaN]}', True, "score that is not JSON"),
        (400, TYPED, True, ""),
        (429, TEI, True, ""),
        (503, TYPED, True, ""),
        (503, b"no server", True, "status 500 or more that is no typed overload"),
        (500, TYPED, True, "status 500 or more that is no typed overload"),
        (502, b"<html>", False, "status 500 or more that is no typed overload"),
        (501, b"<html>", False, ""),
        (400, b"<html>", True, "error that is not a typed envelope"),
        (400, b'{"detail": "no"}', True, "error that is not a typed envelope"),
        (400, b"<html>", False, ""),
        (400, TYPED.replace(b"no", b'File \\"x.py\\"'), True, "stack trace"),
        (400, TYPED.replace(b"no", SECRET.encode()), True, "text repeated in an error"),
    ],
)
def test_the_fuzzer_knows_a_bad_answer(status: int, body: bytes, typed: bool, rule: str) -> None:
    found = violation_of(
        status, b"application/json", body, typed=typed, has_body=True, secrets=(SECRET.encode(), b"other")
    )
    assert found == rule


def test_a_fuzzed_request_is_drawn_from_its_number() -> None:
    cases = [CaseMaker(0, "token").case(number) for number in range(300)]
    assert [CaseMaker(0, "token").case(number) for number in range(300)] == cases
    assert [CaseMaker(1, "token").case(number) for number in range(300)] != cases
    assert len({case.kind for case in cases}) >= 10
    strangers = [case for case in cases if case.kind == "without the token"]
    assert strangers
    assert all(case.statuses == (401,) and b"Bearer token\r\n" not in case.data for case in strangers)
