"""The reward service where it hurts: `python -m bench.serve_stress`

- *Overload*: requests arrive at three times the rate that saturates the service. Each is answered with a score or with
  the typed overload error, the accepted ones in bounded time, from memory that does not grow.
- *Siege*: three times saturation again, with connections that send nothing, and bodies without an end, at once. Health
  answers, and the memory of a replica stays where its limits are.
- *Death*: a replica is killed (SIGKILL) under load. No client that tries again as OpenRLHF's does loses an answer.
- *Hot swap*: the model is exchanged twenty times under load. Every answer has the score of the version that it names.
- *Canary and shadow*: the share of the traffic that a canary gets, and what the service says of a shadow.
- *Scaling*: a second replica is started when requests pile up, and no request is lost over it.

MiniLM in float32 with new heads: the versions differ in every score.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from numpy.typing import NDArray

from bench.load import Load, LoadProcess, Outcome, Summary, read_texts, start_load
from bench.results import Report, Result
from bench.service import (
    RunningServer,
    free_port,
    get_json,
    new_reward_model,
    quiet_transformers,
    running_server,
    serve_command,
    wait_for,
    write_config,
)
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.serving import LimitSettings
from rlhf_ray.reward.core.scorer import RewardScorer

NAME = "reward"
OVERLOAD = 3.0
SWAPS = 20
CANARY_SHARE = 0.1
SWAP_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 3600.0
SAMPLE_S = 2.0
SAME_SCORE = 1e-5
PARTS = ("overload", "siege", "death", "swap", "candidates", "scaling")
IDLE_CONNECTIONS, ENDLESS_BODIES = 64, 16
HEALTH_S = 1.0
_ANSWERS = ("200", "503:overloaded")


@dataclass(frozen=True)
class Plan:
    """What the parts have in common.

    Attributes:
        folder: for configurations and loads.
        texts: JSONL with a text each.
        models: two versions.
        replicas: of the service.
        max_replicas: under load; 0 for no more than those.
    """

    folder: Path
    texts: Path
    models: tuple[Path, Path]
    replicas: int
    max_replicas: int = 0

    def service(self, models: Sequence[Mapping[str, object]], name: str) -> tuple[Path, int]:
        """Configuration and port of a service."""
        port = free_port()
        scaling = {"min_replicas": self.replicas, "max_replicas": max(self.replicas, self.max_replicas)}
        scorer = {"dtype": "float32", "threads": 1}
        return write_config(self.folder / f"{name}.yaml", models, port, scorer=scorer, scaling=scaling), port

    def load(self, server: RunningServer, seconds: float, rate: float | None = None) -> LoadProcess:
        """Load in a process of its own."""
        return start_load(server.url, self.texts, self.folder / "load.jsonl", seconds=seconds, rate=rate)

    def version(self, model: int, **changed: object) -> dict[str, object]:
        """The configuration's entry for one of the versions."""
        return {"name": NAME, "path": str(self.models[model].absolute()), **changed}


def replica_memory(server: RunningServer) -> dict[int, int]:
    """Resident bytes of the processes that score, by their id."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith(("ray::ServeReplica", "ray::ScorerHost")) and "monitor" not in title.lower():
                found[process.pid] = process.memory_info().rss
    return found


def overload_results(plan: Plan, server: RunningServer, seconds: float) -> list[Result]:
    """Three times saturation."""
    plan.load(server, 5.0).result()
    saturated = plan.load(server, 20.0).result().summary
    load = plan.load(server, seconds, rate=OVERLOAD * saturated.throughput)
    memory: dict[int, list[int]] = {}
    while not wait_for(load.process, SAMPLE_S):
        for pid, size in replica_memory(server).items():
            memory.setdefault(pid, []).append(size)
    summary: Summary = load.result().summary
    if not memory:
        raise RuntimeError("the service has no process with the title of a Serve replica")
    unexpected = sum(count for status, count in summary.statuses.items() if status not in _ANSWERS)
    queue_s = LimitSettings().max_queued_requests * plan.replicas / saturated.throughput
    results = [
        Result("saturation, 64 clients", saturated.throughput, "requests/s"),
        Result("overload: length", summary.seconds, "s"),
        Result("overload: requests", summary.tries),
        Result("overload: answers but scores and typed overload", unexpected, target="<= 0"),
        *(Result(f"overload: answers with {status}", count) for status, count in sorted(summary.statuses.items())),
        Result("overload: accepted", summary.throughput, "requests/s"),
        Result("overload: accepted over saturation", summary.throughput / saturated.throughput, "×"),
        Result("overload: median latency of the accepted", summary.p50_s, "s"),
        # What the queue holds, scored at the speed of saturation; twice that, for the cores also refuse the rest.
        Result("overload: p99 latency of the accepted", summary.p99_s, "s", f"<= {2 * queue_s:.2f} s"),
    ]
    results.append(Result("overload: replicas that were replaced", len(memory) / 2 - plan.replicas, target="<= 0"))
    growth = [memory_growth(sizes) for sizes in memory.values()]
    largest = max(memory.values(), key=max)
    for place, size in (("start", largest[0]), ("middle", largest[len(largest) // 2]), ("end", largest[-1])):
        results.append(Result(f"overload: memory of a replica, {place}", size / 2**20, "MiB"))
    return [*results, Result("overload: growth of memory after the first fifth", max(growth), "", "<= 0.05")]


def siege_results(plan: Plan, server: RunningServer, seconds: float) -> list[Result]:
    """Overload, connections that send nothing, and bodies that do not end."""
    saturated = plan.load(server, 20.0).result().summary
    before = replica_memory(server)
    load = plan.load(server, seconds, rate=OVERLOAD * saturated.throughput)
    health, most, sent = asyncio.run(_besiege(server, load))
    summary = load.result().summary
    unexpected = sum(count for status, count in summary.statuses.items() if status not in _ANSWERS)
    limits = LimitSettings()
    # What is held of bodies, and what one of them is while it is parsed and tokenized.
    allowed = limits.max_held_bytes + 10 * limits.max_body_bytes
    return [
        Result("siege: idle connections", IDLE_CONNECTIONS),
        Result("siege: endless bodies at once", ENDLESS_BODIES),
        Result("siege: bytes of endless bodies that were taken", sent / 2**20, "MiB"),
        Result("siege: requests", summary.tries),
        Result("siege: answers but scores and typed overload", unexpected, target="<= 0"),
        Result("siege: accepted over saturation", summary.throughput / saturated.throughput, "×"),
        Result("siege: health, median", statistics.median(health), "s"),
        Result("siege: health, slowest", max(health), "s", f"<= {HEALTH_S:g} s"),
        Result("siege: health, answers", len(health), target=">= 1"),
        Result(
            "siege: growth of a replica's processes",
            max(most[pid] - size for pid, size in before.items()) / 2**20,
            "MiB",
            f"<= {allowed / 2**20:.0f} MiB",
        ),
    ]


async def _besiege(server: RunningServer, load: LoadProcess) -> tuple[list[float], dict[int, int], int]:
    """Seconds that health took, most memory of each process, and bytes of endless bodies that were taken, until a
    load ends."""
    host, port = server.url.removeprefix("http://").split(":")
    health: list[float] = []
    most: dict[int, int] = {}
    sent = 0

    async def endless(number: int) -> None:
        nonlocal sent
        head = b"GET /health HTTP/1.1" if number % 2 else b"POST /get_reward HTTP/1.1"
        part = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        while True:
            _, writer = await asyncio.open_connection(host, int(port))
            with suppress(ConnectionError):
                writer.write(head + b"\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    writer.write(part)
                    await writer.drain()
                    sent += len(part)
            writer.transport.abort()
            await asyncio.sleep(0.1)

    idle = [await asyncio.open_connection(host, int(port)) for _ in range(IDLE_CONNECTIONS)]
    attacks = [asyncio.create_task(endless(number)) for number in range(ENDLESS_BODIES)]
    try:
        while load.process.poll() is None:
            started = time.perf_counter()
            await asyncio.to_thread(get_json, f"{server.url}/health")
            health.append(time.perf_counter() - started)
            for pid, size in replica_memory(server).items():
                most[pid] = max(size, most.get(pid, 0))
            await asyncio.sleep(0.5)
    finally:
        for attack in attacks:
            attack.cancel()
        await asyncio.gather(*attacks, return_exceptions=True)
        for _, writer in idle:
            writer.transport.abort()
    return health, most, sent


def memory_growth(sizes: Sequence[int]) -> float:
    """The last fifth over the second, less one; the first is the warm-up."""
    fifth = max(len(sizes) // 5, 1)
    return statistics.median(sizes[-fifth:]) / statistics.median(sizes[fifth : 2 * fifth] or sizes) - 1


def death_results(plan: Plan, server: RunningServer, seconds: float) -> list[Result]:
    """A replica is killed in the middle of the load."""
    before = replica_memory(server)
    load = plan.load(server, seconds)
    wait_for(load.process, seconds / 4)
    os.kill(min(before), signal.SIGKILL)
    outcome: Load = load.result()
    after = replica_memory(server)
    return [
        Result("death: answers", outcome.summary.accepted),
        Result("death: requests sent again", outcome.summary.tries - len(outcome.outcomes)),
        Result("death: answers lost", outcome.summary.failed, target="<= 0"),
        Result("death: replicas afterwards", len(after), target=f">= {len(before)}"),
        Result("death: of those, new", len(after.keys() - before.keys()), target=">= 1"),
    ]


def swap_results(plan: Plan, config: Path, server: RunningServer) -> list[Result]:
    """The two versions in turn, under load."""
    expected = dict(version_scores(path, plan.texts) for path in plan.models)
    versions = list(expected)
    load = plan.load(server, LOAD_TIMEOUT_S)
    seconds: list[float] = []
    for number in range(SWAPS):
        started = time.perf_counter()
        swap_model(config, server, plan.models[(number + 1) % 2], versions[(number + 1) % 2])
        seconds.append(time.perf_counter() - started)
        print(f"swap {number + 1} of {SWAPS}: {seconds[-1]:.1f} s", flush=True)
    outcome: Load = load.stop()
    named = {each.version for each in outcome.outcomes if each.score is not None}
    return [
        Result("hot swap: swaps", SWAPS),
        Result("hot swap: answers", outcome.summary.accepted),
        Result("hot swap: versions that answered", len(named), target=">= 2"),
        Result("hot swap: failures", outcome.summary.failed, target="<= 0"),
        Result("hot swap: requests sent again", outcome.summary.tries - len(outcome.outcomes), target="<= 0"),
        Result("hot swap: answers with a score of another version", mixed(outcome.outcomes, expected), target="<= 0"),
        Result("hot swap: p99 latency", outcome.summary.p99_s, "s"),
        Result("hot swap: from the command to every replica, median", statistics.median(seconds), "s"),
    ]


def swap_model(config: Path, server: RunningServer, path: Path, version: str) -> None:
    """Put another model in the place of the one that is served, and wait until it answers.

    Raises:
        RuntimeError: the command fails, or the version does not answer in time.
    """
    command = serve_command(config, [f"models.{NAME}.path={path.absolute()}"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=SWAP_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    for _ in range(int(SWAP_TIMEOUT_S / SAMPLE_S)):
        if any(model["version"] == version for model in get_json(f"{server.url}/v1/models")["data"]):
            return
        wait_for(server.process, SAMPLE_S)
    raise RuntimeError(f"version {version} did not answer within {SWAP_TIMEOUT_S:g} s")


def version_scores(model: Path, texts: Path) -> tuple[str, NDArray[Any]]:
    """A model's version, and what it says of each text."""
    scored = RewardScorer(RewardSettings(model=str(model), dtype="float32")).score_texts(read_texts(texts))
    return scored.version, scored.scores


def mixed(outcomes: Sequence[Outcome], expected: Mapping[str, NDArray[Any]]) -> int:
    """Answers whose score is not that of the version they name."""
    return sum(
        outcome.version not in expected
        or bool(abs(expected[outcome.version][outcome.text] - outcome.score) > SAME_SCORE)
        for outcome in outcomes
        if outcome.score is not None
    )


def candidate_results(plan: Plan, seconds: float) -> list[Result]:
    """A canary with a share of the traffic; and a shadow with a head of its own, which the rules must take back."""
    entries = [
        plan.version(0),
        plan.version(0, name="canary", share=CANARY_SHARE),
        plan.version(1, name="shadow", shadow=True),
    ]
    config, port = plan.service(entries, "candidates")
    with running_server(serve_command(config), port) as server:
        load: Load = plan.load(server, seconds).result()
        status = get_json(f"{server.url}/v1/service")
    models: dict[int, set[str]] = {}
    for outcome in load.outcomes:
        models.setdefault(outcome.text, set()).add(outcome.model)
    # A prompt stays with its model: what is drawn is a model for each text.
    share = sum(names == {"canary"} for names in models.values()) / len(models)
    error = (CANARY_SHARE * (1 - CANARY_SHARE) / len(models)) ** 0.5
    shadow = next(row for row in status["candidates"] if row["role"] == "shadow")
    figures = {
        name: value for name, value in shadow.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return [
        Result("canary: nominal share", CANARY_SHARE),
        Result("canary: measured share of the texts", share),
        Result("canary: distance in standard errors", abs(share - CANARY_SHARE) / error, "", "<= 4"),
        Result("canary: texts that two models answered", sum(len(names) > 1 for names in models.values()), "", "<= 0"),
        Result("canary and shadow: failures", load.summary.failed, target="<= 0"),
        Result("shadow: answers from it", sum(each.model == "shadow" for each in load.outcomes), target="<= 0"),
        Result("shadow: rolled back, as the rules demand", int(shadow["rolled_back"]), target=">= 1"),
        *(Result(f"shadow: {name.replace('_', ' ')}", value) for name, value in figures.items()),
    ]


def scaling_results(plan: Plan, seconds: float) -> list[Result]:
    """From one replica to two, by load alone."""
    growing = replace(plan, replicas=1, max_replicas=2)
    config, port = growing.service([growing.version(0)], "scaling")
    with running_server(serve_command(config), port) as server:
        # A replica is heard of with its first beat.
        while not (before := num_replicas(server)):
            wait_for(server.process, SAMPLE_S)
        load = growing.load(server, seconds)
        started, grown_s = time.perf_counter(), 0.0
        while not wait_for(load.process, SAMPLE_S):
            if not grown_s and num_replicas(server) > before:
                grown_s = time.perf_counter() - started
        outcome: Load = load.result()
        after = num_replicas(server)
    return [
        Result("scaling: replicas at rest", before, target="<= 1"),
        Result("scaling: replicas under load", after, target=">= 2"),
        Result("scaling: from the first request to the second replica", grown_s, "s", "> 0"),
        Result("scaling: answers", outcome.summary.accepted),
        Result("scaling: answers lost", outcome.summary.failed, target="<= 0"),
    ]


def num_replicas(server: RunningServer) -> int:
    """Replicas that the service knows of."""
    return len(get_json(f"{server.url}/v1/service")["replicas"])


def main() -> None:
    parser = argparse.ArgumentParser(description="The reward service under overload, death and exchange of models.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the overload")
    parser.add_argument("--replicas", type=int, default=2, help="of the service; with one, nobody stands in for it")
    parser.add_argument("--overload-replicas", type=int, default=1, help="the web server and the clients need a core")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    parts = arguments.parts
    torch.set_num_threads(1)
    quiet_transformers()
    report = Report("serve_stress")
    with TemporaryDirectory() as name:
        folder = Path(name)
        first, second = (new_reward_model(arguments.data / "minilm", folder / f"v{seed}", seed) for seed in (0, 1))
        texts = arguments.data / "hutto-movie" / "snippets_test.jsonl"
        plan = Plan(folder, texts, (first, second), arguments.replicas)
        if {"overload", "siege"} & set(parts):
            crowded = replace(plan, replicas=arguments.overload_replicas)
            config, port = crowded.service([crowded.version(0)], "overload")
            with running_server(serve_command(config), port) as server:
                if "overload" in parts:
                    report.add(overload_results(crowded, server, arguments.seconds), "overload")
                if "siege" in parts:
                    report.add(siege_results(crowded, server, 60.0), "siege")
        config, port = plan.service([plan.version(0)], "service")
        if {"death", "swap"} & set(parts):
            with running_server(serve_command(config), port) as server:
                if "death" in parts:
                    report.add(death_results(plan, server, 60.0), "death")
                if "swap" in parts:
                    report.add(swap_results(plan, config, server), "hot swap")
        if "candidates" in parts:
            report.add(candidate_results(plan, 30.0), "canary and shadow")
        if "scaling" in parts:
            report.add(scaling_results(plan, 120.0), "scaling")


if __name__ == "__main__":
    main()
