"""Sampling ahead of training against taking turns, in one run on one machine. `python -m bench.asynchrony`

One generator and one policy learner of one thread each, so that either is all that a core has to do; responses as long
as make the two take about equal time, which is measured and told. Rounds alternate; a ratio is of medians. The timeline
of a few asynchronous steps is drawn for the documentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.ppo.cases import CASES, prepare
from bench.ppo.ours import Steps, run_ppo
from bench.results import Report, Result
from bench.timeline import draw_timeline

FILES = Path(".bench") / "asynchrony"
IMAGE = Path("docs") / "images" / "asynchrony.png"
TURNS, AHEAD = 0, 1
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run, after the first")
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-samples", type=int, default=16)
    arguments = parser.parse_args()
    case = replace(CASES[0], response_tokens=arguments.response_tokens)
    prepared = prepare(case, arguments.data, FILES)
    overrides = OVERRIDES | {
        "prompts.path": prepared.prompts.absolute(),
        "policy.model": prepared.model.absolute(),
        "sampling.max_response_tokens": case.response_tokens,
        "policy.learner.micro_batch_tokens": arguments.micro_batch_samples * prepared.sequence_tokens,
    }
    report = Report("asynchrony")
    rounds: dict[int, list[Steps]] = {TURNS: [], AHEAD: []}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        for number in range(arguments.rounds):
            for staleness, found in rounds.items():
                print(f"round {number + 1} of {arguments.rounds}: max_staleness {staleness}", flush=True)
                chosen = {**overrides, "algorithm.max_staleness": staleness}
                found.append(run_ppo("grpo.yaml", runs, arguments.data, arguments.steps, chosen))
        trace = json.loads((runs / "bench" / "trace.json").read_text(encoding="utf-8"))
        draw_timeline(trace, IMAGE, steps=(3, 4, 5))
    report.add(results(rounds), case.name)


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
        Result("samples a second, ahead over turns", turns / ahead, target=">= 1.4"),
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
