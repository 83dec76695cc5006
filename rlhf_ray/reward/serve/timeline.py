"""The last ten minutes of the service, in steps of two seconds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.reward.serve.traffic import LATENCY_EDGES_S, Traffic

STEP_S = 2.0
_STEPS = 300


@dataclass
class _Step:
    answered: int = 0
    refused: int = 0
    failed: int = 0
    texts: int = 0
    tokens: int = 0
    latencies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, np.int64))
    queued: dict[str, int] = field(default_factory=dict)


class Timeline:
    """Counts of all replicas, by time."""

    def __init__(self) -> None:
        self._steps: OrderedDict[int, _Step] = OrderedDict()

    def add(self, now: float, replica: str, traffic: Traffic, queued: int) -> None:
        """Count a beat, in the step in which it came.

        Args:
            now: unix time, seconds.
        """
        step = self._steps.setdefault(int(now // STEP_S), _Step())
        step.answered += traffic.outcomes.get("answered", 0)
        step.refused += traffic.outcomes.get("refused", 0)
        step.failed += traffic.outcomes.get("failed", 0)
        step.texts += traffic.texts
        step.tokens += traffic.tokens
        step.latencies += traffic.latencies
        step.queued[replica] = queued
        while len(self._steps) > _STEPS:
            self._steps.popitem(last=False)

    def series(self, now: float) -> dict[str, list[float | None]]:
        """The columns of the page's charts; the step under way is left out."""
        last = int(now // STEP_S)
        times = [number for number in range(last - _STEPS, last) if self._steps and number >= next(iter(self._steps))]
        steps = [self._steps.get(number, _Step()) for number in times]
        return {
            "time": [number * STEP_S for number in times],
            "requests_per_s": [step.answered / STEP_S for step in steps],
            "refused_per_s": [step.refused / STEP_S for step in steps],
            "failed_per_s": [step.failed / STEP_S for step in steps],
            "texts_per_s": [step.texts / STEP_S for step in steps],
            "tokens_per_s": [step.tokens / STEP_S for step in steps],
            "latency_p50_ms": [quantile_ms(step.latencies, 0.5) for step in steps],
            "latency_p99_ms": [quantile_ms(step.latencies, 0.99) for step in steps],
            "queued": [float(sum(step.queued.values())) for step in steps],
        }


def quantile_ms(counts: NDArray[np.int64], quantile: float) -> float | None:
    """A quantile of counted times in ms: the upper edge of its bucket; None where nothing was counted."""
    if not counts.sum():
        return None
    bucket = int(np.searchsorted(np.cumsum(counts), quantile * counts.sum()))
    return float(LATENCY_EDGES_S[min(bucket, len(LATENCY_EDGES_S) - 1)] * 1000)
