"""A picture of a run's `trace.json`: a row a process, a block a call, a colour a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

_NAMED_FROM = 0.02
"""Blocks that are longer than this share of the picture bear their method's name."""


def draw_timeline(trace: Mapping[str, Any], path: Path, steps: Sequence[int], title: str = "") -> None:
    """Draw some steps of a trace.

    Args:
        trace: in Chrome's format, as `runtime/timeline.py` writes it.
        steps: which; a call belongs to the step that was being trained when it ended.
    """
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    calls = [event for event in events if event["ph"] == "X" and event["args"]["step"] in steps]
    begun = min(event["ts"] for event in calls)
    length = max(event["ts"] + event["dur"] for event in calls) - begun
    rows = sorted({event["pid"] for event in calls}, reverse=True)
    figure, axes = plt.subplots(figsize=(11, 0.55 * len(rows) + 1.2), layout="constrained")
    colours = plt.get_cmap("tab10")
    for event in calls:
        left, width = (event["ts"] - begun) / 1e6, event["dur"] / 1e6
        colour = colours(list(steps).index(event["args"]["step"]) % 10)
        row = rows.index(event["pid"])
        axes.barh(row, width, left=left, height=0.7, color=colour, edgecolor="white", linewidth=0.5)
        if event["dur"] > _NAMED_FROM * length:
            axes.text(left + width / 2, row, event["name"], ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(rows)), [names[row] for row in rows])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=colours(index % 10), label=f"until step {step}") for index, step in enumerate(steps)]
    axes.legend(handles=patches, ncols=len(patches), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_title(title, loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
