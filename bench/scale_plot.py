"""A picture of what `bench.scale` found: who is busy at which staleness, and what the driver's time grows with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_scale(by_staleness: Mapping[int, Any], by_size: Mapping[str, Any], path: Path) -> None:
    """Three panels.

    Args:
        by_staleness: a `Measured` for each `algorithm.max_staleness`, with the same roles.
        by_size: a `Measured` for each size.
    """
    figure, (busy, step, driver) = plt.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1.2, 0.8, 1.2)
    )
    ticks = range(len(by_staleness))
    for role in next(iter(by_staleness.values())).busy:
        busy.plot(ticks, [100 * each.busy[role] for each in by_staleness.values()], marker="o", label=role)
    busy.set(title="At work, 64 roles", ylabel="% of the step", ylim=(0, 105))
    busy.legend(frameon=False, fontsize=8, ncols=2)
    step.bar(ticks, [each.step_s for each in by_staleness.values()], color="#3b6ea5", width=0.6)
    step.set(title="A step, 64 roles", ylabel="seconds at the roles' own speed")
    for axes in (busy, step):
        axes.set_xticks(ticks, [str(staleness) for staleness in by_staleness])
        axes.set_xlabel("algorithm.max_staleness")
    driver.barh(list(by_size), [1e3 * each.own_s for each in by_size.values()], color="#d9d9d9", label="Ray's threads")
    driver.barh(list(by_size), [1e3 * each.python_s for each in by_size.values()], color="#3b6ea5", label="the loop")
    driver.invert_yaxis()
    driver.set(title="The driver's own time", xlabel="ms of CPU a step")
    driver.legend(frameon=False, fontsize=8)
    for axes in (busy, step, driver):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
