"""What each process did in a step: the share of the cores that was busy, and a trace to look at.

`trace.json` is in Chrome's trace format (open it in Perfetto or chrome://tracing): a row a process, a block a call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import collect
from rlhf_ray.runtime.role_host import Activity, Span
from rlhf_ray.tracking.run_folder import write_atomic


class Timeline:
    """Reads the roles' activity after each step.

    Args:
        groups: all roles of the run.
        trace: file that is written.
        trace_steps: steps, from the first on, that the trace has; 0 writes none.
        timeout_s: for one reading.
    """

    def __init__(self, groups: Sequence[ActorGroup[Any]], trace: Path, trace_steps: int, timeout_s: float) -> None:
        self._replicas = [replica for group in groups for replica in group]
        self._trace, self._trace_steps, self._timeout_s = trace, trace_steps, timeout_s
        self._cores = float(ray.cluster_resources().get("CPU", 1.0))
        self._events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": replica.name}}
            for number, replica in enumerate(self._replicas)
        ]
        self._steps = 0
        self._read_at = 0.0
        self._activities()  # loading the models is not part of any step

    def read(self, step: int) -> float:
        """The share of the cluster's core-seconds that roles were busy since the last reading."""
        before = self._read_at
        activities = self._activities()
        if self._steps < self._trace_steps:
            self._steps += 1
            self._events += [
                _event(step, number, span) for number, activity in enumerate(activities) for span in activity.spans
            ]
            write_atomic(self._trace, json.dumps({"traceEvents": self._events}))
        return sum(activity.cpu_s for activity in activities) / (self._cores * (self._read_at - before))

    def _activities(self) -> list[Activity]:
        activities = collect([replica.activity() for replica in self._replicas], self._timeout_s)
        self._read_at = time.monotonic()
        return activities


def _event(step: int, process: int, span: Span) -> dict[str, Any]:
    """A complete event; times are microseconds."""
    return {
        "ph": "X",
        "name": span.task,
        "pid": process,
        "tid": 0,
        "ts": span.start_s * 1e6,
        "dur": span.duration_s * 1e6,
        "args": {"step": step, "cpu_s": span.cpu_s},
    }
