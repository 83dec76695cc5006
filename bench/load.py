"""Load on a reward service, measured at the client: `python -m bench.load URL --texts FILE`

Two kinds of clients, both of OpenRLHF's wire (`POST /get_reward`, one sample a request):

- *closed loop*: N clients, each waits for its answer before it sends the next. A request that fails is sent up to five
  times, one second apart, with 180 s for each: what OpenRLHF's `remote_rm_fn` does.
- *open loop*: requests arrive as a Poisson process, whatever has become of those before, and are sent once. Latency
  counts from the arrival, so that a client that falls behind its own schedule shows it.

It is a program of its own: its work is not in the process that it measures, and `taskset` can give it a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np

from rlhf_ray.randomness import keyed_generator

TRIES = 5
BETWEEN_TRIES_S = 1.0
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        text: which of the texts it asked for.
        sent_s: when it was first sent (closed loop) or arrived (open loop), from the beginning of the load.
        latency_s: from then to the last answer, tries and pauses included.
        status: of the last answer; 0 where the connection failed or nothing came in time.
        error: the type that the last answer gave for its error; the exception's name where there was no answer.
        tries: how often it was sent.
        model, version: what the answer's headers say of the model.
        score: the reward, as it was sent; None without one.
    """

    text: int
    sent_s: float
    latency_s: float
    status: int
    error: str = ""
    tries: int = 1
    model: str = ""
    version: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Summary:
    """A load in a few numbers.

    Attributes:
        seconds: from the first request to the last answer.
        accepted: requests answered with a score.
        throughput: accepted requests per second.
        p50_s, p99_s: latency of the accepted requests; NaN where there is none.
        statuses: requests by status, and by type of error behind a colon.
        tries: requests that were sent, repetitions included.
        cpu_s_per_request: what the client itself cost.
    """

    seconds: float
    accepted: int
    throughput: float
    p50_s: float
    p99_s: float
    statuses: dict[str, int]
    tries: int
    cpu_s_per_request: float

    @property
    def failed(self) -> int:
        """Requests that never got a score."""
        return sum(self.statuses.values()) - self.accepted


@dataclass(frozen=True)
class Load:
    """What came of a load: each request, and all together."""

    outcomes: tuple[Outcome, ...]
    summary: Summary


def summarise(outcomes: Sequence[Outcome], seconds: float, cpu_s: float) -> Summary:
    """All requests in a few numbers.

    Args:
        seconds: that the load took.
        cpu_s: that the client took of its own.
    """
    latencies = [outcome.latency_s for outcome in outcomes if outcome.score is not None]
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (np.nan, np.nan)
    statuses = Counter(f"{outcome.status}:{outcome.error}".removesuffix(":") for outcome in outcomes)
    tries = sum(outcome.tries for outcome in outcomes)
    return Summary(
        seconds=seconds,
        accepted=len(latencies),
        throughput=len(latencies) / seconds,
        p50_s=float(p50),
        p99_s=float(p99),
        statuses=dict(sorted(statuses.items())),
        tries=tries,
        cpu_s_per_request=cpu_s / max(tries, 1),
    )


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, ascending, from 0 to `seconds`.

    Args:
        rate: expected arrivals per second.
    """
    random = keyed_generator(seed, "arrivals")
    times = np.cumsum(random.exponential(1 / rate, size=int(rate * seconds + 10 * (rate * seconds) ** 0.5) + 10))
    return [float(each) for each in times[times < seconds]]


def request_body(text: str) -> bytes:
    """One sample, as OpenRLHF sends it."""
    return json.dumps({"query": [text], "prompts": [text[: len(text) // 2]], "labels": [""]}).encode()


class LoadGenerator:
    """Clients on one event loop.

    Args:
        url: of the service, without a path.
        texts: that are asked for, in turn.
        token: bearer token, or empty.
    """

    def __init__(self, url: str, texts: Sequence[str], token: str = "") -> None:
        self._url = f"{url}/get_reward"
        self._bodies = [request_body(text) for text in texts]
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._outcomes: list[Outcome] = []
        self._next = 0
        self._stopped = asyncio.Event()
        self._started_s = time.perf_counter()

    def stop(self) -> None:
        """Send nothing new; requests under way are waited for."""
        self._stopped.set()

    async def closed_loop(self, clients: int, seconds: float) -> Load:
        """Clients that wait for their answers, until the time is over or `stop`."""

        async def client(session: aiohttp.ClientSession) -> None:
            while not self._stopped.is_set():
                await self._request(session, self._now_s(), TRIES)

        async def clients_of(session: aiohttp.ClientSession) -> None:
            running = asyncio.gather(*(client(session) for _ in range(clients)))
            await self._pause(seconds)
            self.stop()
            await running

        return await self._measure(clients_of)

    async def open_loop(self, rate: float, seconds: float, seed: int) -> Load:
        """Requests that arrive when they arrive, `rate` a second, until the time is over or `stop`."""

        async def arrive(session: aiohttp.ClientSession) -> None:
            async with asyncio.TaskGroup() as running:
                for arrival_s in arrivals(rate, seconds, seed):
                    # Those that are due already go out together: a pause each would slow the arrivals down.
                    if arrival_s > self._now_s():
                        await self._pause(arrival_s - self._now_s())
                    if self._stopped.is_set():
                        break
                    running.create_task(self._request(session, arrival_s, 1))

        return await self._measure(arrive)

    async def _measure(self, work: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> Load:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as session:
            self._started_s, cpu_s = time.perf_counter(), time.process_time()
            await work(session)
            seconds, cpu_s = self._now_s(), time.process_time() - cpu_s
        return Load(tuple(self._outcomes), summarise(self._outcomes, seconds, cpu_s))

    async def _pause(self, seconds: float) -> None:
        """That long, or until `stop`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _request(self, session: aiohttp.ClientSession, sent_s: float, tries: int) -> None:
        text = self._next % len(self._bodies)
        self._next += 1
        for number in range(1, tries + 1):
            outcome = await self._try(session, text, sent_s, number)
            if outcome.score is not None:
                break
            if number < tries:
                await asyncio.sleep(BETWEEN_TRIES_S)
        self._outcomes.append(outcome)

    async def _try(self, session: aiohttp.ClientSession, text: int, sent_s: float, number: int) -> Outcome:
        try:
            async with session.post(self._url, data=self._bodies[text]) as response:
                body, status, headers = await response.read(), response.status, response.headers
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return Outcome(text, sent_s, self._now_s() - sent_s, 0, type(error).__name__, number)
        latency_s = self._now_s() - sent_s
        if status != 200:
            return Outcome(text, sent_s, latency_s, status, error_type(body), number)
        score = float(json.loads(body)["rewards"][0])
        model, version = headers.get("X-Model-Name", ""), headers.get("X-Model-Version", "")
        return Outcome(text, sent_s, latency_s, 200, "", number, model, version, score)

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s


def error_type(body: bytes) -> str:
    """The type in a typed error; `untyped` for anything else."""
    try:
        kind = json.loads(body)["error"]["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "untyped"
    return kind if isinstance(kind, str) else "untyped"


def read_texts(path: Path) -> list[str]:
    """The `text` of each line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@dataclass(frozen=True)
class LoadProcess:
    """A load that runs in a process of its own."""

    process: subprocess.Popen[bytes]
    out: Path

    def stop(self) -> Load:
        """Send nothing new, and return what came of it."""
        self.process.send_signal(signal.SIGTERM)
        return self.result()

    def result(self) -> Load:
        """What came of it, when it is over."""
        if self.process.wait() != 0:
            raise RuntimeError(f"the load generator ended with status {self.process.returncode}")
        lines = self.out.read_text(encoding="utf-8").splitlines()
        return Load(tuple(Outcome(**json.loads(line)) for line in lines[1:]), Summary(**json.loads(lines[0])))


def start_load(
    url: str,
    texts: Path,
    out: Path,
    *,
    seconds: float,
    clients: int = 64,
    rate: float | None = None,
    token: str = "",
) -> LoadProcess:
    """A load in a process of its own.

    Args:
        texts: JSONL with a `text` each.
        out: file for what came of it.
        clients: of a closed loop.
        rate: arrivals per second of an open loop, instead of the clients.
    """
    command = [sys.executable, "-m", "bench.load", url, "--texts", str(texts), "--out", str(out)]
    command += ["--seconds", str(seconds), "--clients", str(clients)]
    command += [] if rate is None else ["--rate", str(rate)]
    out.unlink(missing_ok=True)
    return LoadProcess(subprocess.Popen(command, env=os.environ | {"RLHF_RAY_TOKEN": token}), out)


async def _run(arguments: argparse.Namespace) -> Load:
    generator = LoadGenerator(arguments.url, read_texts(arguments.texts), os.environ.get("RLHF_RAY_TOKEN", ""))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, generator.stop)
    if arguments.rate is not None:
        return await generator.open_loop(arguments.rate, arguments.seconds, arguments.seed)
    return await generator.closed_loop(arguments.clients, arguments.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Load on a reward service, measured at the client.")
    parser.add_argument("url", help="of the service, without a path")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL with a text each")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop")
    parser.add_argument("--rate", type=float, help="arrivals per second: an open loop instead of clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSONL: the summary, then each request; printed when left out")
    arguments = parser.parse_args()
    import uvloop

    load = uvloop.run(_run(arguments))
    if arguments.out is None:
        print(json.dumps(asdict(load.summary), indent=2))
        return
    with arguments.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(load.summary)) + "\n")
        file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in load.outcomes)


if __name__ == "__main__":
    main()
