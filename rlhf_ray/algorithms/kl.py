"""KL penalty: estimators of the divergence from the reference model, and controllers of the penalty's weight."""

from __future__ import annotations

import math
from typing import Literal

import torch

from rlhf_ray.config.algorithm import KLSettings

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference), from tokens sampled by the policy.

    After Schulman 2020, "Approximating KL Divergence". With `d = log π − log π_ref`: `k1 = d` (unbiased, high variance,
    may be negative), `k2 = d²/2` (biased, low variance), `k3 = exp(−d) − 1 + d` (unbiased, low variance, not negative).

    The estimates are differentiable, but an unbiased value is not an unbiased gradient: on the policy's own samples the
    expected gradient of k1 is zero, that of k2 is the gradient of KL(policy || reference), that of k3 is the gradient
    of KL(reference || policy). As a term of the loss k1 therefore does nothing.

    k3 grows like exp(−d) and is cut off at d = −20, beyond which it is constant: an infinity would make the loss NaN.

    Args:
        logprobs: `[R]` nats, under the policy.
        reference_logprobs: `[R]` nats, under the reference.
        estimator: which.

    Returns:
        `[R]` nats.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        difference = difference.clamp(min=-20.0)
        # expm1 keeps the digits that exp(−d) − 1 would lose for small d, where most tokens are.
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}; one of k1, k2, k3")


class KLController:
    """Sets the weight of the KL penalty; its state belongs into the checkpoint.

    `fixed` stays with the settings, also after a resume with other ones. `adaptive` is proportional control in log
    space (Ziegler et al. 2019, section 2.2): `e = clip(kl / target − 1, −0.2, 0.2)`, then `β ← β (1 + e · num_samples /
    horizon)`. A step larger than the horizon counts as one horizon; with five times as many samples β would otherwise
    turn negative.

    Args:
        settings: of the run.

    Attributes:
        coefficient: β of the next step.
    """

    MAX_ERROR = 0.2

    def __init__(self, settings: KLSettings) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def update(self, kl: float, num_samples: int) -> None:
        """Take note of one step.

        Args:
            kl: mean over the step's sequences of the summed per-token KL, nats.
            num_samples: sequences of the step.
        """
        if self._settings.controller == "fixed":
            return
        if not math.isfinite(kl):
            raise ValueError(f"the KL divergence of a step must be finite, not {kl}")
        error = min(max(kl / self._settings.target - 1, -self.MAX_ERROR), self.MAX_ERROR)
        self.coefficient *= 1 + error * min(num_samples / self._settings.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self._settings.controller == "adaptive":
            self.coefficient = state["coefficient"]
