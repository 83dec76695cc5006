"""What stops a run on purpose, before the next update is made or the next checkpoint written.

Each guard raises a `RoleFailure` that names the role, the cause and what to do; the run ends non-zero, and its newest
checkpoint is one of before the harm. A gradient that is not finite is refused where it is computed, before it is
applied (`roles/deepspeed_engine.py`); a disk without room before a checkpoint is begun (`runtime/checkpoints.py`).
"""

from __future__ import annotations

import math

from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.ppo.metrics import StepHeaders
from rlhf_ray.ppo.scoring import SourceHeaders
from rlhf_ray.roles.critic_learner import CriticReport
from rlhf_ray.roles.policy_learner import PolicyReport


def check_scores(headers: StepHeaders, step: int) -> None:
    """Before training: a failed score is set aside, but not too many of them are.

    Args:
        step: number of the step, from 1.

    Raises:
        RoleFailure: a source failed that is to end the run, failed on more than its `max_failed_fraction`, or nothing
            has a reward.
    """
    for each in headers.rewards:
        if each.num_failures:
            _check_source(each, step)
    if headers.num_failures == headers.num_samples:
        _stop("scores", "reward", f"not one sample of step {step} has a score: {headers.failure_causes}")


def _check_source(headers: SourceHeaders, step: int) -> None:
    source, causes = headers.source, headers.failure_causes
    found = f"{headers.num_failures} samples of step {step} have no score"
    if source.on_failure == "fail":
        _stop("scores", f"reward '{source.name}'", f"{found}, and on_failure is 'fail': {causes}")
    # What is only logged is not worth a run.
    if source.weight and headers.failed_fraction > source.max_failed_fraction:
        _stop(
            "scores",
            f"reward '{source.name}'",
            f"{found}, {headers.failed_fraction:.0%} of them, above max_failed_fraction "
            f"{source.max_failed_fraction:g}: {causes}; mend the source and continue with --resume",
        )


def check_finite(step: int, policy: PolicyReport, critic: CriticReport | None) -> None:
    """After training: everything that the next step builds on is a finite number.

    The moments of the advantages may be NaN where no token has any; then nothing was learned from them.

    Args:
        step: number of the step, from 1.

    Raises:
        RoleFailure: naming the first metric that is not.
    """
    stats = policy.stats
    figures: list[tuple[str, str, float | None]] = [
        ("reference", "kl/reference", stats.kl_reference),
        ("policy", "reward/shaped_mean", stats.shaped_reward_mean),
        ("policy", "policy/loss", policy.loss),
        ("policy", "policy/entropy", policy.entropy),
        ("policy", "policy/grad_norm", policy.grad_norm),
    ]
    if critic is not None:
        figures += [
            ("critic", "value/loss", critic.loss),
            ("critic", "return/mean", critic.return_mean),
            ("critic", "critic/grad_norm", critic.grad_norm),
        ]
    moments = (("advantage/mean", stats.advantage_mean), ("advantage/std", stats.advantage_std))
    figures += [("policy", name, value) for name, value in moments if not math.isnan(value)]
    for role, name, value in figures:
        if value is not None and not math.isfinite(value):
            _stop(
                "finite",
                role,
                f"{name} is {value} at step {step}; the checkpoint before it is sound, but the same settings end here "
                "again: lower the learning rate, bound the rewards, or compute in float32",
            )


def kl_beyond(kl: float | None, limit: float | None) -> str | None:
    """Why the run should end early, keeping its policy, or None.

    Args:
        kl: `kl/reference` of the step, nats.
        limit: `algorithm.kl.stop_above`.
    """
    if kl is None or limit is None or kl <= limit:
        return None
    return f"kl/reference is {kl:.2f} nats, above algorithm.kl.stop_above {limit:g}"


def _stop(guard: str, role: str, cause: str) -> None:
    raise RoleFailure(FailureKind.FATAL, role, "?", cause, guard=guard)
