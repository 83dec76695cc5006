"""Whether an engine computes with the weights that were sent to it.

Learner and engine compute log-probs of the same fixed tokens. With the same weights they differ by rounding only: next
to nothing in float32, hundredths of a nat in bfloat16, where a small fault would drown if only the distance counted.
So the *change* since the version before is compared as well: rounding is the same kind of noise before and after, and
the engine must have moved as the learner has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.settings import WeightSettings
from rlhf_ray.rollout import Shipped

_NOISE_FLOOR = {True: 2e-6, False: 2e-3}
"""Rounding of one log-prob in nats, in float32 and in bfloat16: below it no residual is a fault."""
_MAX_NOISE_RATIO = 4.0
"""Two independent roundings differ by 1.4 times one of them in the median; the rest is room for chance."""


@dataclass(frozen=True)
class Parity:
    """Engine against learner after one sync.

    Attributes:
        version: of the weights.
        max_abs: largest |engine − learner| log-prob over the probe's tokens, nats.
        median_abs: its median.
        change: median |change| of the learner's log-probs since the version before; 0 at the first.
        residual: median |engine's change − learner's change|; 0 at the first.
        fault: what is wrong, or empty.
        first_fault: what was wrong when the weights were loaded for the first time, or empty.
    """

    version: int
    max_abs: float
    median_abs: float
    change: float
    residual: float
    fault: str
    first_fault: str = ""

    @classmethod
    def without_weights(cls, version: int, fault: str) -> Parity:
        """Of weights that the engine could not load."""
        return cls(version, math.nan, math.nan, math.nan, math.nan, fault)


@dataclass(frozen=True)
class Probed(Shipped):
    """Log-probs of the probe's tokens under one version: what the next version is compared with.

    Attributes:
        version: of the weights.
        engine, learner: `[N]` float64.
        parity: how they compare.
        since: the version before, which the change is measured from; None at the first.
    """

    version: int
    engine: NDArray[np.float64]
    learner: NDArray[np.float64]
    parity: Parity
    since: int | None = None

    def header(self) -> Parity:
        """The comparison."""
        return self.parity


def compare(
    settings: WeightSettings,
    version: int,
    engine: NDArray[np.float32],
    learner: NDArray[np.float32],
    *,
    exact: bool,
    before: Probed | None = None,
) -> Probed:
    """Compare engine and learner under one version.

    Args:
        settings: the limits.
        engine, learner: `[N]` log-probs of the probe's tokens.
        exact: both compute in float32 on CPUs.
        before: of the version before, from the same engine or another that computes the same.
    """
    now = Probed(version, engine.astype(np.float64), learner.astype(np.float64), Parity.without_weights(version, ""))
    apart = np.abs(now.engine - now.learner)
    max_abs, median_abs = float(apart.max()), float(np.median(apart))
    change = residual = 0.0
    fault = _too_far(settings, max_abs, median_abs, exact)
    if before is not None:
        engine_change, learner_change = now.engine - before.engine, now.learner - before.learner
        change = float(np.median(np.abs(learner_change)))
        residual = float(np.median(np.abs(engine_change - learner_change)))
        noise = max(float(np.median(np.abs(before.engine - before.learner))), _NOISE_FLOOR[exact])
        if not engine_change.any() and learner_change.any():
            fault = fault or "the engine still computes with the weights of the version before"
        elif residual > _MAX_NOISE_RATIO * noise:
            fault = fault or (
                f"the engine's log-probs moved otherwise than the learner's: median residual {residual:.2e} of a "
                f"change of {change:.2e}, where rounding explains {_MAX_NOISE_RATIO * noise:.2e}"
            )
    parity = Parity(version, max_abs, median_abs, change, residual, fault)
    return replace(now, parity=parity, since=None if before is None else before.version)


def _too_far(settings: WeightSettings, max_abs: float, median_abs: float, exact: bool) -> str:
    name, found, limit = (
        ("max_abs_dlogp_float32", max_abs, settings.max_abs_dlogp_float32)
        if exact
        else ("max_median_dlogp_bfloat16", median_abs, settings.max_median_dlogp_bfloat16)
    )
    # A comparison with NaN is false: it must count as too far.
    return "" if found <= limit else f"|Δ log-prob| is {found:.2e}, above weights.{name} {limit:g}"
