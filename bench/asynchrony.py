"""Sampling ahead of training against taking turns, in one run on one machine. `python -m bench.asynchrony`

Speed: one generator and one policy learner of one thread each, so that either is all that a core has to do; responses
as long as make the two take about equal time, which is measured and told. Rounds alternate; a ratio is of medians. The
timeline of a few asynchronous steps is drawn for the documentation.

Quality: the tiny policy learns the task of `bench/learning.py` with both, over some seeds; the final held-out rewards
are compared seed by seed. Staleness: that of every step of a long run, with whole and with in-flight updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from scipy import stats

from bench.learning import configuration, presets, train
from bench.ppo.cases import CASES, prepare
from bench.ppo.ours import Steps, run_ppo
from bench.results import Report, Result
from bench.timeline import draw_timeline

FILES = Path(".bench") / "asynchrony"
IMAGE = Path("docs") / "images" / "asynchrony.png"
TURNS, AHEAD = 0, 1
QUALITY_STEPS, STALENESS_STEPS = 30, 160
OVERRIDES = {
    "policy.learner.dtype": "float32",
    "policy.learner.threads": 1,
    "generator.dtype": "float32",
    "generator.threads": 1,
    "reference": None,
    "algorithm.kl": {"coefficient": 0.0},
    "tracking.trace_steps": 6,
}


def main() -> None:
    """All rounds, the table, and the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.asynchrony", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with tiny")
    parser.add_argument("--parts", default="speed,quality,staleness", help="some of them, with commas between")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run, after the first")
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-samples", type=int, default=16)
    arguments = parser.parse_args()
    report, parts = Report("asynchrony"), arguments.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        if "speed" in parts:
            _speed(arguments, runs, report)
        if "quality" in parts:
            report.add(quality(arguments.data, runs, arguments.seeds), "quality")
        if "staleness" in parts:
            report.add(staleness(arguments.data, runs), "staleness")


def _speed(arguments: argparse.Namespace, runs: Path, report: Report) -> None:
    case = replace(CASES[0], response_tokens=arguments.response_tokens)
    prepared = prepare(case, arguments.data, FILES)
    overrides = OVERRIDES | {
        "prompts.path": prepared.prompts.absolute(),
        "policy.model": prepared.model.absolute(),
        "sampling.max_response_tokens": case.response_tokens,
        "policy.learner.micro_batch_tokens": arguments.micro_batch_samples * prepared.sequence_tokens,
    }
    rounds: dict[int, list[Steps]] = {TURNS: [], AHEAD: []}
    for number in range(arguments.rounds):
        for max_staleness, found in rounds.items():
            print(f"round {number + 1} of {arguments.rounds}: max_staleness {max_staleness}", flush=True)
            chosen = {**overrides, "algorithm.max_staleness": max_staleness}
            found.append(run_ppo("grpo.yaml", runs, arguments.data, arguments.steps, chosen))
    trace = json.loads((runs / "bench" / "trace.json").read_text(encoding="utf-8"))
    draw_timeline(trace, IMAGE, steps=(3, 4, 5))
    report.add(results(rounds), case.name)


def quality(data: Path, runs: Path, seeds: int) -> list[Result]:
    """Final held-out rewards with and without running ahead, seed by seed."""
    preset = presets()["RLOO"]
    finals: dict[int, list[float]] = {TURNS: [], AHEAD: []}
    for seed in range(seeds):
        for max_staleness, found in finals.items():
            config = configuration(preset, data, runs, f"quality-{max_staleness}-{seed}", QUALITY_STEPS, seed)
            config["algorithm"]["max_staleness"] = max_staleness
            summary = json.loads((train(config, runs) / "summary.json").read_text(encoding="utf-8"))
            found.append(float(summary["held_out"]["reward_after"]))
    apart = [ahead - turns for turns, ahead in zip(finals[TURNS], finals[AHEAD], strict=True)]
    mean = statistics.fmean(apart)
    half = float(stats.t.ppf(0.975, seeds - 1)) * statistics.stdev(apart) / seeds**0.5
    return [
        Result("final reward, taking turns", statistics.fmean(finals[TURNS])),
        Result("final reward, sampling ahead", statistics.fmean(finals[AHEAD])),
        Result("difference, ahead less turns", mean),
        Result("half of its 95 % interval", half),
        Result("difference over that half", abs(mean) / half, target="<= 1"),
    ]


def staleness(data: Path, runs: Path) -> list[Result]:
    """The stalest token of each step, over ten thousand samples."""
    results = []
    for in_flight in (False, True):
        config = configuration(presets()["RLOO"], data, runs, f"staleness-{in_flight}", STALENESS_STEPS)
        config["algorithm"] |= {"max_staleness": 2, "in_flight_updates": in_flight}
        rows = [json.loads(line) for line in (train(config, runs) / "metrics.jsonl").read_text().splitlines()]
        name = "in-flight updates" if in_flight else "whole updates"
        results += [
            Result(f"samples, {name}", rows[-1]["samples"], target=">= 10000"),
            Result(f"stalest token, max_staleness 2, {name}", max(row["staleness/max"] for row in rows), target="<= 2"),
            Result(f"mean staleness, {name}", statistics.fmean(row["staleness/mean"] for row in rows)),
        ]
    return results


def results(rounds: dict[int, list[Steps]]) -> list[Result]:
    """What the rounds come to."""
    turns, ahead = (statistics.median(_step_s(steps) for steps in rounds[key]) for key in (TURNS, AHEAD))
    generate, train = (statistics.median(_busy_s(steps, *call) for steps in rounds[TURNS]) for call in _CALLS)
    busy = statistics.median(share for steps in rounds[AHEAD] for share in steps.metric("utilization/busy"))
    return [
        Result("a step, taking turns", turns, "s"),
        Result("a step, sampling ahead", ahead, "s"),
        Result("of it generation, taking turns", generate, "s"),
        Result("of it training, taking turns", train, "s"),
        Result("samples per second, ahead over turns", turns / ahead, target=">= 1.4"),
        Result("utilization/busy, sampling ahead", busy, target=">= 0.85"),
    ]


_CALLS = (("generator-0", "generate"), ("policy-0", "train"))


def _step_s(steps: Steps) -> float:
    return statistics.median(steps.wall_s)


def _busy_s(steps: Steps, role: str, method: str) -> float:
    """Wall time of a method in one of the traced steps, each of which trains once."""
    return steps.busy[role][method].wall_s / steps.busy["policy-0"]["train"].calls


if __name__ == "__main__":
    main()
