"""From measured rounds to results with their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.ppo.cases import SAMPLES, Case
from bench.ppo.measure import ONE_PROCESS, BareModel, Ours, TrlSteps
from bench.ppo.ours import Steps
from bench.ppo.workers import Work
from bench.results import Result

CORES = 2


@dataclass
class Rounds:
    """What the rounds of one case gave, in their order; empty where it was not asked for."""

    trl: list[TrlSteps] = field(default_factory=list)
    ours: list[Ours] = field(default_factory=list)
    sampling: list[Steps] = field(default_factory=list)
    engine: list[list[Work]] = field(default_factory=list)
    model: list[BareModel] = field(default_factory=list)
    copies_s: list[float] = field(default_factory=list)

    def steps_s(self) -> list[float]:
        """Our step in each round."""
        return [median(ours.steps.wall_s) for ours in self.ours]

    def phase(self, name: str) -> list[float]:
        """A phase of our step in each round; nothing where the runs do not log it."""
        each = [ours.steps.metric(f"time/{name}_s") for ours in self.ours]
        return [median(values) for values in each if values]


def trl_results(case: Case, rounds: Rounds) -> list[Result]:
    trl, ours = [median(run.wall_s) for run in rounds.trl], rounds.steps_s()
    results = []
    for name, steps in (("TRL", trl), ("ours", ours)):
        results.append(Result(f"{case.name}: step of {name}", median(steps), "s"))
        results.append(Result(f"{case.name}: step of {name}, fastest round", min(steps), "s"))
        results.append(Result(f"{case.name}: step of {name}, slowest round", max(steps), "s"))
        results.append(Result(f"{case.name}: {name}", SAMPLES / median(steps), "samples/s"))
    phases = sorted({name for run in rounds.ours for name in run.steps.rows[0] if name.startswith("time/")})
    for phase in phases:
        name = phase.removeprefix("time/").removesuffix("_s")
        results.append(Result(f"{case.name}: ours, {name}", median(rounds.phase(name)), "s"))
    busy = [value for run in rounds.ours for value in run.steps.metric("utilization/busy")]
    if busy:
        results.append(Result(f"{case.name}: ours, cores busy", median(busy)))
    # Rounds are compared with their neighbour in time, so that a machine that slows down slows both.
    target = f">= {case.over_trl}"
    return [*results, Result(f"{case.name}: ours over TRL", _ratio(trl, ours), "×", target)]


def generator_results(case: Case, rounds: Rounds) -> list[Result]:
    bare = [median(work.wall_s for work in works) for works in rounds.engine]
    ours = [median(steps.metric("time/generate_s")) for steps in rounds.sampling]
    tokens = SAMPLES * case.response_tokens
    return [
        Result(f"{case.name}: bare vLLM, two processes of one thread", tokens / median(bare), "tokens/s"),
        Result(f"{case.name}: our generators", tokens / median(ours), "tokens/s"),
        Result(f"{case.name}: generators over bare vLLM", _ratio(bare, ours), "×", ">= 0.97"),
    ]


def learner_results(case: Case, rounds: Rounds) -> list[Result]:
    bare = [median(work.wall_s for work in model.train[ONE_PROCESS]) for model in rounds.model]
    ours = rounds.phase("train")
    peaks = [max(work.peak_bytes for work in model.train[ONE_PROCESS]) for model in rounds.model]
    own = [sum(size for name, size in run.peaks.items() if name.startswith("policy-")) for run in rounds.ours]
    return [
        Result(f"{case.name}: hand-written loop", median(bare), "s"),
        Result(f"{case.name}: our learner", median(ours), "s"),
        Result(f"{case.name}: learner over the loop", _ratio(bare, ours), "×", ">= 0.95"),
        Result(f"{case.name}: hand-written loop, peak", median(peaks) / 1e9, "GB"),
        Result(f"{case.name}: our learner, peak of all ranks", median(own) / 1e9, "GB"),
    ]


def sync_results(case: Case, rounds: Rounds) -> list[Result]:
    ours = rounds.phase("sync")
    # A few MB are copied in less time than two processes take to exchange a message: no target.
    target = None if case.model == "tiny" else "<= 3"
    results = [
        Result(f"{case.name}: copy of the weights' bytes", median(rounds.copies_s), "s"),
        Result(f"{case.name}: sync of the weights", median(ours), "s"),
        Result(f"{case.name}: sync over the copy", _ratio(ours, rounds.copies_s), "×", target),
    ]
    probe = rounds.phase("probe")
    if probe:
        results.append(Result(f"{case.name}: proof of a sync", 100 * _ratio(probe, rounds.steps_s()), "%", "<= 3 %"))
    return results


def floor_results(case: Case, rounds: Rounds) -> list[Result]:
    """The bare components' CPU time, each in its cheaper layout, over the cores."""
    cpu_s: Mapping[str, list[float]] = {
        "generation": [_cpu_s(works) for works in rounds.engine],
        "reference": [_cheapest(model.reference) for model in rounds.model],
        "scores": [_cheapest(model.score) for model in rounds.model],
        "training": [_cheapest(model.train) for model in rounds.model],
    }
    floor = [sum(each) / CORES for each in zip(*cpu_s.values(), strict=True)]
    results = [Result(f"{case.name}: floor, {name}", median(values) / CORES, "s") for name, values in cpu_s.items()]
    return [
        *results,
        Result(f"{case.name}: floor of a step", median(floor), "s"),
        *_busy_results(case, rounds),
        Result(f"{case.name}: step over its floor", _ratio(rounds.steps_s(), floor), "×", "<= 1.15"),
    ]


def layout_results(case: Case, steps_s: Mapping[str, Sequence[float]]) -> list[Result]:
    return [Result(f"{case.name}: step, {name}", median(steps), "s") for name, steps in steps_s.items()]


def _busy_results(case: Case, rounds: Rounds) -> list[Result]:
    """CPU seconds of our roles over the cores, from the traces of the last round; they stand beside the floor's."""
    if not rounds.ours:
        return []
    return [
        Result(f"{case.name}: ours, {role}.{method}", busy.cpu_s / CORES, "s")
        for role, methods in sorted(rounds.ours[-1].steps.busy.items())
        for method, busy in sorted(methods.items())
    ]


def _cheapest(shapes: Mapping[tuple[int, int], Sequence[Work]]) -> float:
    return min(_cpu_s(works) for works in shapes.values())


def _cpu_s(works: Iterable[Work]) -> float:
    return median(work.cpu_s for work in works)


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return median(one / other for one, other in zip(numerators, denominators, strict=True))


@dataclass(frozen=True)
class Part:
    """A comparison: what it needs of a round, and its results."""

    needs: tuple[str, ...]
    results: Callable[[Case, Rounds], list[Result]]


PARTS = {
    "trl": Part(("trl", "ours"), trl_results),
    "generator": Part(("engine", "sampling"), generator_results),
    "learner": Part(("ours", "model"), learner_results),
    "sync": Part(("ours", "copies_s"), sync_results),
    "floor": Part(("ours", "engine", "model"), floor_results),
}
