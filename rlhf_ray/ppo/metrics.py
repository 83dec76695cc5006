"""One row of `metrics.jsonl` from what the learners, the headers and the clock say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.groups import GroupChoice, choose_groups
from rlhf_ray.algorithms.parity import Parity
from rlhf_ray.config.settings import SamplingSettings
from rlhf_ray.ppo.scoring import SourceHeaders, all_causes, mean_and_std, rewards_of
from rlhf_ray.ppo.state import LoopState
from rlhf_ray.roles.critic_learner import CriticReport
from rlhf_ray.roles.policy_learner import PolicyReport
from rlhf_ray.rollout import RolloutHeader
from rlhf_ray.runtime.answers import Answer, collect
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.logs import EventLog

MIN_EFFECTIVE_FRACTION = 0.5
"""Below this effective sample size, as a share, a step is warned of."""

COLUMNS = (
    Column("reward/mean", "reward", "+.3f", curve=True, better="higher"),
    Column("kl/reference", "KL ref", ".2f", curve=True),
    Column("policy/entropy", "entropy", ".2f"),
    Column("response/length_mean", "length", ".1f"),
    Column("value/explained_variance", "expl.var", "+.2f"),
    Column("mismatch/mean_ratio", "mismatch", ".4f"),
    Column("throughput/tokens_per_s", "tok/s", ".0f"),
    Column("time/step_s", "s/step", ".1f"),
)


@dataclass(frozen=True)
class StepHeaders:
    """Sums over the headers of one step."""

    rollouts: tuple[RolloutHeader, ...]
    rewards: tuple[SourceHeaders, ...]

    @property
    def num_samples(self) -> int:
        return sum(header.num_samples for header in self.rollouts)

    @property
    def num_response_tokens(self) -> int:
        return sum(header.num_response_tokens for header in self.rollouts)

    @property
    def scores(self) -> NDArray[np.float64]:
        """`[B]` the rewards as the sources gave them, in the order of the draw; NaN where there is none."""
        return rewards_of(self.rewards)

    @property
    def num_failures(self) -> int:
        """Samples without a reward."""
        return int(np.isnan(self.scores).sum())

    def choice(self, sampling: SamplingSettings) -> GroupChoice:
        """Which prompts are trained on."""
        return choose_groups(self.scores.reshape(-1, sampling.samples_per_prompt), sampling.prompts_per_step)

    @property
    def failure_causes(self) -> dict[str, int]:
        """How often each cause occurred."""
        return all_causes(self.rewards)

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest weights that tokens were sampled with."""
        return min(header.version_min for header in self.rollouts), max(header.version_max for header in self.rollouts)

    def staleness(self, version: int) -> tuple[float, int]:
        """Mean and largest distance of the sampled tokens' weights from the learner's, in versions."""
        sampled = sum(header.num_sampled_tokens for header in self.rollouts)
        total = sampled * version - sum(header.version_sum for header in self.rollouts)
        return total / sampled, version - min(header.version_min for header in self.rollouts)


def warn_if_off_policy(events: EventLog, step: int, policy: PolicyReport) -> None:
    """An event where the step's samples are worth less than half their number under the policy that learns from them.

    Args:
        step: number of the step.
    """
    fraction = policy.importance_effective_fraction
    if fraction is not None and fraction < MIN_EFFECTIVE_FRACTION:
        cause = (
            f"importance/effective_sample_fraction is {fraction:.3f}: the policy that sampled is far from the one that "
            "is trained; lower the staleness, or look at mismatch/*"
        )
        events.write("samples_off_policy", step=step, cause=cause, effective_sample_fraction=fraction)


class StepClock:
    """How long a step waited for each phase.

    Args:
        timeout_s: of each wait.
        started: when the step began, as `time.monotonic` counts; None for now.
    """

    def __init__(self, timeout_s: float, started: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._started = time.monotonic() if started is None else started
        self._ended = self._started
        self.phases: dict[str, float] = {}

    def next(self) -> Self:
        """The clock of the step after, which begins where `step_s` was read: the time in between belongs to somebody.

        What is done between two steps, such as waiting for a checkpoint, is the later one's.
        """
        return type(self)(self._timeout_s, self._ended)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase in which something else is waited for."""
        began = time.monotonic()
        yield
        self.phases[f"time/{name}_s"] = time.monotonic() - began

    def wait(self, phases: Mapping[str, Sequence[Answer[Any]]]) -> dict[str, list[Any]]:
        """Wait for all answers of all phases at once, so that the first failure ends the step, whose ever it is.

        A phase took, as `time/<name>_s`, from the end of the phases before it to its own last answer.

        Args:
            phases: in the order in which they are expected to end.

        Returns:
            The values of each phase.
        """
        began = time.monotonic()
        ends: dict[str, float] = dict.fromkeys(phases, began)
        phase_of = {answer: name for name, answers in phases.items() for answer in answers}

        def arrived(answer: Answer[Any]) -> None:
            ends[phase_of[answer]] = time.monotonic()

        values = iter(collect(list(phase_of), self._timeout_s, arrived))
        for name, end in ends.items():
            end = max(end, began)
            self.phases[f"time/{name}_s"] = self.phases.get(f"time/{name}_s", 0.0) + end - began
            began = end
        return {name: [next(values) for _ in answers] for name, answers in phases.items()}

    @property
    def step_s(self) -> float:
        """Up to now, where the step ends."""
        self._ended = time.monotonic()
        return self._ended - self._started


def step_row(
    state: LoopState,
    headers: StepHeaders,
    choice: GroupChoice,
    policy: PolicyReport,
    critic: CriticReport | None,
    parity: Parity,
    sampled_version: int,
    kl_coefficient: float,
    clock: StepClock,
    busy: float,
) -> dict[str, float | int | None]:
    """All metrics of a step by their registered names.

    Args:
        state: after the step.
        headers: of all that was sampled.
        choice: what of it was trained on.
        sampled_version: the learner's version when the step was sampled.
        busy: share of the cluster's core-seconds that roles used.
    """
    stats = policy.stats
    reward_mean, reward_std = mean_and_std(headers.scores)
    staleness_mean, staleness_max = headers.staleness(sampled_version)
    step_s = clock.step_s
    row: dict[str, float | int | None] = {
        "step": state.step,
        "samples": state.samples,
        "tokens": state.tokens,
        "reward/mean": reward_mean,
        "reward/std": reward_std,
        "reward/shaped_mean": stats.shaped_reward_mean,
        "reward/failures": headers.num_failures,
        "reward/truncated": sum(header.num_truncated for each in headers.rewards for header in each.shards),
        "kl/reference": stats.kl_reference,
        "kl/reference_per_token": None
        if stats.kl_reference is None
        else stats.kl_reference / max(stats.response_length_mean, 1.0),
        "kl/coefficient": kl_coefficient,
        "policy/loss": policy.loss,
        "policy/entropy": policy.entropy,
        "policy/clip_fraction": policy.clip_fraction,
        "policy/approx_kl": policy.approx_kl,
        "policy/ratio_max": math.exp(min(policy.max_abs_log_ratio, 80.0)),
        "policy/importance_weight_mean": policy.importance_weight_mean,
        "importance/effective_sample_fraction": policy.importance_effective_fraction,
        "importance/truncated_fraction": policy.importance_truncated_fraction,
        "importance/masked_fraction": policy.importance_masked_fraction,
        "policy/grad_norm": policy.grad_norm,
        "policy/lr": policy.learning_rate,
        "advantage/mean": stats.advantage_mean,
        "advantage/std": stats.advantage_std,
        "group/uniform_fraction": choice.num_uniform / choice.num_compared if choice.num_compared else None,
        "response/length_mean": stats.response_length_mean,
        "response/truncated_fraction": stats.truncated_fraction,
        "response/eos_fraction": 1.0 - stats.truncated_fraction,
        "response/masked": stats.num_masked,
        "response/not_sampled": headers.num_response_tokens - sum(each.num_sampled_tokens for each in headers.rollouts),
        "mismatch/kl": policy.mismatch_kl,
        "mismatch/max_abs_dlogp": policy.mismatch_max_abs,
        "mismatch/mean_ratio": policy.mismatch_mean_ratio,
        "sync/max_abs_dlogp": parity.max_abs,
        "sync/change": parity.change,
        "sync/residual": parity.residual,
        "weights/version": state.step,
        "staleness/mean": staleness_mean,
        "staleness/max": staleness_max,
        **clock.phases,
        "time/step_s": step_s,
        "utilization/busy": busy,
        "throughput/samples_per_s": headers.num_samples / step_s,
        "throughput/tokens_per_s": headers.num_response_tokens / step_s,
    }
    for each in headers.rewards:
        row |= each.metrics()
    if choice.num_groups > len(choice.places):
        row |= {"group/surplus": choice.num_surplus, "group/unfilled": choice.num_unfilled}
    ensembles = [(each.source.weight, each.disagreement) for each in headers.rewards if each.disagreement is not None]
    if ensembles:
        row["reward/disagreement"] = sum(abs(weight) * disagreement for weight, disagreement in ensembles)
    if critic is not None:
        row |= {
            "value/loss": critic.loss,
            "value/clip_fraction": critic.clip_fraction,
            "value/explained_variance": critic.explained_variance,
            "return/mean": critic.return_mean,
            "critic/grad_norm": critic.grad_norm,
            "critic/lr": critic.learning_rate,
        }
    return row
