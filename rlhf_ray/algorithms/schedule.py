"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_lr_ratio: float,
) -> float:
    """Learning rate of one optimizer step: a linear warm-up, then the schedule.

    The first of w warm-up steps takes `peak / w`, the last one `peak`. After it `linear` and `cosine` (Loshchilov &
    Hutter 2017, eq. 5, one cycle) fall from `peak` and reach `peak * min_lr_ratio` at step `total_steps`, the first
    after the end, so that no step is wasted on a rate of 0; later steps stay there.

    Args:
        step: optimizer steps already made; 0 for the first.
        peak: rate at the top.
        warmup_steps: 0 starts at the peak.
        total_steps: length of the run, warm-up included.
        schedule: shape after the warm-up.
        min_lr_ratio: where the schedule ends, as a share of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - min_lr_ratio) * progress)
    if schedule == "cosine":
        return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown schedule {schedule!r}; one of constant, linear, cosine")
