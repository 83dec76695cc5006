"""What it costs a run that loses nothing to be able to lose something."""

from __future__ import annotations

import statistics

from bench.chaos_site import Outcome, Site
from bench.results import Report, Result

STEPS = 60
_WARM = 10
_SETTINGS = (f"steps={STEPS}", "sampling.prompts_per_step=32", "evaluation={prompts: null, judge: none}")
_WITHOUT = ("cluster.max_restarts=0", "cluster.silent_after_s=1e6", "checkpoint.every_steps=1000")
"""Nothing is started again or watched, and there are no checkpoints."""


def cost(site: Site, report: Report, rounds: int) -> None:
    """Runs with everything that the defaults do and without, in turns."""
    ratios, seconds = [], []
    for number in range(rounds):
        took = {}
        # Each goes first as often as the other.
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            name = f"cost-{kind}-{number}"
            more = ("cluster.silent_after_s=45",) if kind == "with" else _WITHOUT
            took[kind] = _step_s(site.run(name, *_SETTINGS, *more))
            site.forget(name)
        ratios.append(took["with"] / took["without"])
        seconds.append(took["with"])
        print(f"a step: {took['with']:.3f} s with all of it, {took['without']:.3f} s without", flush=True)
    results = [
        Result("a step with all of it", statistics.median(seconds), "s"),
        Result("a step with all of it, of one without", statistics.median(ratios), target="<= 1.02"),
        Result("the lowest of the rounds", min(ratios)),
        Result("the highest of the rounds", max(ratios)),
    ]
    report.add(results, f"the cost in a run that loses nothing, {rounds} rounds")


def _step_s(outcome: Outcome) -> float:
    """Seconds a step once it is warm, checkpoints included."""
    if outcome.status:
        raise RuntimeError(f"status {outcome.status}: {outcome.error}")
    return (outcome.wall_s[-1] - outcome.wall_s[_WARM - 1]) / (STEPS - _WARM)
