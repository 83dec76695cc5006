"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from rlhf_ray.config.settings import LearnerSettings


def learning_rate(step: int, settings: LearnerSettings, total_steps: int) -> float:
    """Learning rate of one optimizer step: a linear warm-up, then the schedule.

    The first of w warm-up steps takes `peak / w`, the last one `peak`. After it `linear` and `cosine` (Loshchilov &
    Hutter 2017, eq. 5, one cycle) fall from `peak` and reach `peak * min_lr_ratio` at step `total_steps`, the first
    after the end, so that no step is wasted on a rate of 0; later steps stay there.

    Args:
        step: optimizer steps already made; 0 for the first.
        settings: `learning_rate` (the peak), `warmup_steps`, `lr_schedule` and `min_lr_ratio`.
        total_steps: length of the run, warm-up included.
    """
    peak, warmup_steps, ratio = settings.learning_rate, settings.warmup_steps, settings.min_lr_ratio
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if settings.lr_schedule == "constant":
        return peak
    falling = 1 - progress if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (ratio + (1 - ratio) * falling)
