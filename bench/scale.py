"""`make bench-scale`: the driver's own time, with up to 256 stub roles that take as long as the real ones should.

Loop, calls, object store and role hosts are the real ones. 256 processes do not fit a small machine, so several role
hosts share one; the driver makes the same calls, and each role still does its own work one after another. The roles'
times are those that bench/costs.py computes for configs/multi-node/ppo-70b.yaml, divided by `SPEED`. Shares of a step
refer to the step at the roles' own speed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise, repeat
from pathlib import Path
from typing import Any

import ray

from bench.costs import CASES, Hardware, Part, step_of
from bench.results import FOLDER, Report, Result
from bench.scale_plot import draw_scale
from bench.stub_inputs import stub_inputs
from bench.stubs import Latencies, StubSettings, stub_classes
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.loop import PPO
from rlhf_ray.ppo.metrics import COLUMNS
from rlhf_ray.ppo.roles import Roles, role_makers, role_requests, roles_of
from rlhf_ray.runtime.actor_group import ActorGroup, Replica
from rlhf_ray.runtime.answers import collect
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.runtime.role_host import Activity, Place, RoleHost
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.run_folder import write_atomic

CONFIG = Path(__file__).parents[1] / "configs" / "multi-node" / "ppo-70b.yaml"
IMAGE = Path("docs") / "images" / "scale.png"
SPEED = 20.0
STALENESS = (0, 1, 2, 4)
HOUSES = 3
LIMITS = Limits(start_s=120.0, call_s=600.0)
_WAITING = 2000
_BESIDE = -1
"""Calls that may wait in one process for their turn."""


class Turn:
    """Lets calls of one role begin in the order in which they were made, `at_once` of them at the same time."""

    def __init__(self, at_once: int) -> None:
        self._at_once, self._done = at_once, 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, ticket: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: ticket < self._done + self._at_once)
        try:
            yield
        finally:
            with self._changed:
                self._done += 1
                self._changed.notify_all()


class RoleHouse:
    """Many role hosts in one process. An actor; its calls come in any order, each with the ticket of its role."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._hosts: dict[str, tuple[RoleHost, Turn]] = {}

    def add(self, name: str, at_once: int) -> Place:
        """A new host; gives its place."""
        self._hosts[name] = RoleHost(name, self._log, 1, LIMITS), Turn(at_once)
        return self._hosts[name][0].place()

    def clear(self) -> None:
        self._hosts = {}

    def free_port(self, name: str, ticket: int) -> int:
        return self._in_turn(name, ticket, lambda host: host.free_port())

    def build(self, name: str, ticket: int, role: Callable[[], Any]) -> None:
        self._in_turn(name, ticket, lambda host: host.build(role))

    def call(self, name: str, ticket: int, method: str, *args: Any) -> Any:
        return self._in_turn(name, ticket, lambda host: host.call(method, *args))

    def keep(self, name: str, ticket: int, method: str, *args: Any) -> tuple[Any, Any]:
        return self._in_turn(name, ticket, lambda host: host.keep(method, *args))

    def activity(self, name: str, ticket: int) -> Activity:
        return self._in_turn(name, ticket, lambda host: host.activity())

    def _in_turn(self, name: str, ticket: int, action: Callable[[RoleHost], Any]) -> Any:
        host, turn = self._hosts[name]
        if ticket == _BESIDE:
            return action(host)
        with turn.of(ticket):
            return action(host)


@dataclass(frozen=True)
class _Method:
    """One method of a role in a house, called as an actor's."""

    actor_method: Any
    name: str
    tickets: Iterator[int]

    def options(self, **options: Any) -> _Method:
        # A house has threads for everybody: what is asked beside the others just does not wait for its turn.
        beside = options.pop("concurrency_group", None) is not None
        return _Method(self.actor_method.options(**options), self.name, repeat(_BESIDE) if beside else self.tickets)

    def remote(self, *args: Any) -> Any:
        return self.actor_method.remote(self.name, next(self.tickets), *args)


class HousedRole:
    """Takes the place of the actor of one role."""

    def __init__(self, house: Any, name: str) -> None:
        self._house, self._name, self._tickets = house, name, count()

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._house, method), self._name, self._tickets)


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        roles: how many there were.
        own_s: CPU time of the driver's process in one step, Ray's threads included; median over steps.
        python_s: of the loop's thread alone.
        step_s: of a step at the roles' own speed.
        tokens: response tokens of a step.
        busy: mean share of a step in which a replica was at work, by role.
    """

    roles: int
    own_s: float
    python_s: float
    step_s: float
    tokens: float
    busy: dict[str, float]


def latencies_of(parts: Sequence[Part], config: PPOConfig, tokens: float) -> Latencies:
    """Seconds a token on one replica, from the seconds of a whole step that the arithmetic gives."""
    seconds = {part.name: part.seconds / SPEED for part in parts}
    critic, reference = config.critic, config.reference
    assert critic is not None, "the configuration has one"
    assert reference is not None, "the configuration has one"
    policy_ranks, critic_ranks = config.policy.learner.replicas, critic.learner.replicas
    return Latencies(
        engine_step_s=seconds["generator: decode"] / config.sampling.max_response_tokens,
        reward_s=seconds["reward: scores"] * config.reward[0].replicas / tokens,
        reference_s=seconds["reference: log-probs"] * reference.replicas / tokens,
        values_s=seconds["critic: values"] * critic_ranks / tokens,
        logprobs_s=seconds["policy: old log-probs"] * policy_ranks / tokens,
        policy_s=seconds["policy: learning"] * policy_ranks / tokens,
        critic_s=seconds["critic: learning"] * critic_ranks / tokens,
        sync_s=seconds["weight sync"],
    )


def configuration(scale: int, folder: Path, name: str, overrides: Sequence[str]) -> PPOConfig:
    """The 70 B configuration with 16 generators (64 roles in all), times `scale` in roles and shards."""
    counts = {
        "generator.replicas": 16,
        "policy.learner.replicas": 32,
        "critic.learner.replicas": 8,
        "reference.replicas": 4,
        "reward.replicas": 4,
        "sampling.prompts_per_step": 512,
    }
    scaled = [f"{key}={value * scale}" for key, value in counts.items()]
    fixed = ["evaluation.prompts=null", "steps=7", "tracking.trace_steps=7", "tracking.progress=off"]
    return load_config(PPOConfig, CONFIG, [*scaled, *fixed, f"run.name={name}", f"paths.runs={folder}", *overrides])


def measure(
    houses: Sequence[Any], scale: int, folder: Path, name: str, mean_tokens: float, overrides: Sequence[str]
) -> Measured:
    """One run with its roles spread over the houses."""
    config = configuration(scale, folder, name, overrides)
    case = CASES[1]
    latencies = latencies_of(step_of(case, Hardware()).parts, case.config, 512 * case.length)
    stub = StubSettings(latencies=latencies, meets=False, mean_tokens=mean_tokens)
    inputs = stub_inputs(config, stub, num_prompts=4000, num_held_out=0)
    ray.get([house.clear.remote() for house in houses])
    groups: dict[str, ActorGroup[Any]] = {}
    number = count()
    for request in role_requests(config):
        names = [f"{request.role}-{index}" for index in range(request.settings.replicas)]
        homes = [houses[next(number) % len(houses)] for _ in names]
        at_once = request.settings.concurrent_calls
        places = ray.get([home.add.remote(each, at_once) for home, each in zip(homes, names, strict=True)])
        replicas: list[Replica[Any]] = [
            Replica(each, place, HousedRole(home, each)) for home, each, place in zip(homes, names, places, strict=True)
        ]
        groups[request.role] = ActorGroup(request.role, replicas, LIMITS)
    roles = roles_of(config, inputs, groups)
    makers = role_makers(config, inputs, stub_classes(stub))
    collect([answer for name, group in groups.items() for answer in makers[name].build(group)], LIMITS.start_s)
    marks: list[tuple[float, float, float, float]] = []
    with Run(config, "ppo", name, config.steps, COLUMNS, config.checkpoint, False) as run:
        written = run.tracker.step

        def noted(row: Any) -> None:
            written(row)
            marks.append((time.process_time(), time.thread_time(), time.monotonic(), float(row["tokens"])))

        run.tracker.step = noted  # type: ignore[method-assign]
        loop = PPO(config, inputs, roles, run)
        loop.train()
        trace = json.loads(run.folder.trace.read_text(encoding="utf-8"))["traceEvents"]
    # While the first steps are trained engines have more to sample than later, and nothing while the last ones are.
    ahead = config.algorithm.max_staleness
    counted = range(2 + ahead, config.steps - ahead + 1)
    taken = [tuple(b - a for a, b in zip(before, after, strict=True)) for before, after in pairwise(marks)]
    steps = [taken[step - 2] for step in counted]
    middle = len(steps) // 2
    own_s, python_s, step_s, tokens = (sorted(each)[middle] for each in zip(*steps, strict=True))
    return Measured(
        roles=sum(len(group) for group in roles.groups()),
        own_s=own_s,
        python_s=python_s,
        step_s=step_s * SPEED,
        tokens=tokens,
        busy=_busy(trace, roles, counted, sum(step[2] for step in steps)),
    )


def _busy(trace: Sequence[dict[str, Any]], roles: Roles, counted: Container[int], wall_s: float) -> dict[str, float]:
    """In some steps, which took `wall_s`; a generator's calls overlap, so what counts is whether there was any."""
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    at_work: dict[str, list[tuple[float, float]]] = {}
    for event in trace:
        if event["ph"] == "X" and event["args"]["step"] in counted:
            at_work.setdefault(names[event["pid"]], []).append((event["ts"], event["ts"] + event["dur"]))
    shares: dict[str, float] = {}
    for group in roles.groups():
        covered = 0.0
        for replica in group:
            end = 0.0
            for start, stop in sorted(at_work.get(replica.name, [])):
                covered += max(stop - max(start, end), 0.0)
                end = max(end, stop)
        shares[group.role] = covered / 1e6 / (wall_s * len(group))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as algorithm.max_staleness=1")
    parser.add_argument("--quick", action="store_true", help="64 roles only")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the largest run there")
    arguments = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    report = Report("scale")
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        config = configuration(1, folder, "connect", arguments.overrides)
        connect(config.cluster.model_copy(update={"num_cpus": HOUSES}))
        try:
            house = ray.remote(RoleHouse).options(num_cpus=1, max_concurrency=_WAITING)
            houses = [house.remote(str(folder / f"house-{index}.log")) for index in range(HOUSES)]
            runs = {
                "64 roles": (1, 128.0, ()),
                "64 roles, 4 times the prompts": (
                    1,
                    128.0,
                    ("sampling.prompts_per_step=2048", "sampling.prompts_per_shard=64"),
                ),
                "64 roles, 4 times the tokens": (1, 512.0, ()),
                "256 roles": (4, 128.0, ()),
            }
            if arguments.quick:
                runs = {"64 roles": runs["64 roles"]}
            sizes = tuple(runs)
            if not arguments.quick:
                runs |= {_at(staleness): (1, 128.0, _steps_at(staleness)) for staleness in STALENESS}
            found: dict[str, Measured] = {}
            for name, (scale, mean_tokens, overrides) in runs.items():
                run_name = name.replace(" ", "-").replace(",", "")
                arguments_of = (houses, scale, folder, run_name, mean_tokens, [*arguments.overrides, *overrides])
                if arguments.profile is not None and name == sizes[-1]:
                    found[name] = _profiled(arguments.profile, arguments_of)
                else:
                    found[name] = measure(*arguments_of)
                report.add(_results(name, found[name]), name)
        finally:
            ray.shutdown()
    if not arguments.quick:
        draw_scale({each: found[_at(each)] for each in STALENESS}, {name: found[name] for name in sizes}, IMAGE)
    rows = {name: vars(each) for name, each in found.items()}
    write_atomic(FOLDER / "scale_runs.json", json.dumps(rows, indent=2) + "\n")


def _at(staleness: int) -> str:
    return f"64 roles, staleness {staleness}"


def _steps_at(staleness: int) -> tuple[str, ...]:
    steps = 6 + 2 * staleness
    return f"algorithm.max_staleness={staleness}", f"steps={steps}", f"tracking.trace_steps={steps}"


def _profiled(path: Path, arguments: Sequence[Any]) -> Measured:
    import cProfile

    profile = cProfile.Profile()
    measured = profile.runcall(measure, *arguments)
    profile.dump_stats(path)
    return measured


def _results(name: str, found: Measured) -> list[Result]:
    few = found.roles <= 64
    results = [
        Result(f"{name}: driver's own time a step", found.own_s * 1e3, "ms", "< 20 ms" if few else None),
        Result(f"{name}: of it in Python", found.python_s * 1e3, "ms"),
        Result(f"{name}: share of a step", found.own_s / found.step_s, "", None if few else "< 0.01"),
        Result(f"{name}: own time a token", found.own_s / found.tokens * 1e6, "µs"),
        Result(f"{name}: step", found.step_s, "s"),
    ]
    return results + [Result(f"{name}: {role} busy", share) for role, share in found.busy.items()]


if __name__ == "__main__":
    main()
