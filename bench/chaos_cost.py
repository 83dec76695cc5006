"""What it costs a run that loses nothing to be able to lose something.

Machines are not equally fast for long, so one run goes on with and without by turns: for ten steps its processes are
watched and a checkpoint is written, as by default; for the next ten nothing of that happens. Each ten steps with it are
compared with those before and after them.
"""

from __future__ import annotations

import statistics

from bench.chaos_site import DEADLINE_S, Site
from bench.results import Report, Result
from rlhf_ray.cli import main
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.tracking.tracker import Tracker

_BLOCK = 10
_SETTINGS = (
    *("sampling.prompts_per_step=32", "evaluation={prompts: null, judge: none}"),
    *("cluster.silent_after_s=45", f"checkpoint.every_steps={2 * _BLOCK}"),
)


def cost(site: Site, report: Report, blocks: int) -> None:
    """One run of so many blocks with all of it, and one more without."""
    command = site.begin("cost", f"steps={(2 * blocks + 1) * _BLOCK}", *_SETTINGS, module="bench.chaos_cost")
    command.wait(4 * DEADLINE_S)
    outcome = site.outcome("cost", command)
    if outcome.status:
        raise RuntimeError(f"status {outcome.status}: {outcome.error}")
    # The first steps of a run are slower.
    starts = range(_BLOCK, len(outcome.wall_s), _BLOCK)
    seconds = [(outcome.wall_s[start + _BLOCK - 1] - outcome.wall_s[start - 1]) / _BLOCK for start in starts]
    ratios = [
        seconds[place] / statistics.mean((seconds[place - 1], seconds[place + 1]))
        for place in range(1, len(seconds) - 1, 2)
    ]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    results = [
        Result("a step", statistics.median(seconds), "s"),
        Result("a step with all of it, of one without", statistics.mean(ratios), target="<= 1.02"),
        Result("its standard error", error),
    ]
    report.add(results, f"the cost in a run that loses nothing, {len(ratios)} times {_BLOCK} steps")


class _Turns:
    """Whether it is the turn of steps with everything: those that follow a checkpoint."""

    step = 0

    @classmethod
    def are_watched(cls) -> bool:
        return cls.step // _BLOCK % 2 == 0


def _by_turns() -> None:
    look, take = Supervisor._look, Tracker.step

    def look_if_it_is_time(self: Supervisor, patience_s: float) -> None:
        if _Turns.are_watched():
            look(self, patience_s)

    def take_and_count(self: Tracker, row: dict[str, float | int | None]) -> None:
        take(self, row)
        _Turns.step = int(row["step"] or 0)

    Supervisor._look = look_if_it_is_time  # type: ignore[method-assign]
    Tracker.step = take_and_count  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    _by_turns()
    main()
