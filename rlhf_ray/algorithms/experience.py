"""The one place where rows and columns become advantages, shared by the policy learner and the critic learner.

Both learners must see the same numbers, so both call `build_experience` with the same columns. What is computed across
samples reaches over one shard at most (the samples of a prompt are never split over shards) or goes through
`all_reduce` as a sum, so the result does not depend on how the shards are spread over ranks, apart from the order of
floating-point additions. A sample whose reward failed has no part in anything: not in a baseline, not in a moment, not
in a mean, and its tokens weigh 0 in the losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms.advantages import comparable, gae, grpo, rloo, whiten
from rlhf_ray.algorithms.kl import KLEstimator, kl_estimate
from rlhf_ray.algorithms.losses import LossAggregation, token_weights
from rlhf_ray.algorithms.rewards import shape_scores, token_rewards
from rlhf_ray.algorithms.segments import AllReduce, Moments, segment_ids, segment_sum, single_rank
from rlhf_ray.rollout import FINISH_STOP, RewardColumn, Rollout, TokenColumn


@dataclass(frozen=True)
class ExperienceSpec:
    """How columns become advantages.

    Attributes:
        advantage: `gae` with a critic; `rloo` and `grpo` compare the samples of a prompt by their summed token rewards,
            undiscounted, and give every token of a response the same advantage.
        gamma: discount γ of `gae`.
        gae_lambda: λ of `gae`.
        reward_whiten: standardise the step's scores before they are shaped.
        advantage_whiten: standardise the step's advantages over its response tokens.
        score_clip: clip scores to ± this; None: off.
        missing_eos_penalty: subtracted from the score of a response that did not end by itself.
        kl_estimator: per-token estimator of the penalty.
        kl_in_reward: subtract β·KL from each token's reward; false where the penalty is a term of the loss.
        loss_aggregation: what the losses are a mean over.
    """

    advantage: Literal["gae", "rloo", "grpo"]
    gamma: float
    gae_lambda: float
    reward_whiten: bool
    advantage_whiten: bool
    score_clip: float | None
    missing_eos_penalty: float
    kl_estimator: KLEstimator
    kl_in_reward: bool
    loss_aggregation: LossAggregation


@dataclass(frozen=True)
class ExperienceShard:
    """One rollout and its columns, as they come out of the object store.

    Attributes:
        rollout: the rows.
        rewards: a score or a failure for each sample.
        reference: log-probs of the reference; None without one.
        values: the critic's values; None without a critic.
        policy: the learner's own log-probs before its first update; None: those of the rollout are the old ones.
    """

    rollout: Rollout
    rewards: RewardColumn
    reference: TokenColumn | None = None
    values: TokenColumn | None = None
    policy: TokenColumn | None = None

    def __post_init__(self) -> None:
        if len(self.rewards.scores) != self.rollout.num_samples:
            raise ValueError(f"{len(self.rewards.scores)} scores for {self.rollout.num_samples} samples")
        for name, column in (("reference", self.reference), ("values", self.values), ("policy", self.policy)):
            if column is not None and column.data.shape != self.rollout.logprobs.shape:
                raise ValueError(f"{name}: column of shape {column.data.shape} for {len(self.rollout.logprobs)} tokens")


@dataclass(frozen=True)
class ShardExperience:
    """What the losses need of one shard. `[R]` floating-point tensors are of the type asked for.

    Attributes:
        lengths: `[B]` int64 response lengths.
        ok: `[B]` bool, samples with a score.
        weights: `[R]` loss weights, 0 for tokens of failed samples; see `token_weights`.
        old_logprobs: `[R]` what the ratio is taken to.
        engine_logprobs: `[R]` as the engine gave them.
        reference_logprobs: `[R]`, or None.
        advantages: `[R]`, whitened if so specified; 0 for failed samples.
        values: `[R]` old values, or None.
        returns: `[R]` targets of the critic, never whitened, or None without values; 0 for failed samples.
    """

    lengths: torch.Tensor
    ok: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    values: torch.Tensor | None
    returns: torch.Tensor | None


@dataclass(frozen=True)
class ExperienceStats:
    """Statistics of the step over all ranks. Means are over valid samples, and NaN where there are none.

    Attributes:
        num_samples: all samples.
        num_valid: samples with a score.
        num_valid_tokens: their response tokens.
        score_mean: mean of the scores as the reward model gave them.
        score_std: their population standard deviation.
        shaped_reward_mean: mean over sequences of the summed token rewards, what the advantages are made of: the shaped
            score, less β·KL where the penalty is in the reward.
        kl_reference: mean over sequences of the summed per-token k1 of old log-probs against the reference, nats; None
            without a reference.
        advantage_mean: over tokens, before whitening.
        advantage_std: over tokens, before whitening.
        response_length_mean: tokens.
        truncated_fraction: share of responses that did not end by themselves.
    """

    num_samples: int
    num_valid: int
    num_valid_tokens: int
    score_mean: float
    score_std: float
    shaped_reward_mean: float
    kl_reference: float | None
    advantage_mean: float
    advantage_std: float
    response_length_mean: float
    truncated_fraction: float


@dataclass(frozen=True)
class Experience:
    """This rank's shards, in the order given, and the statistics of all ranks."""

    shards: list[ShardExperience]
    stats: ExperienceStats


@dataclass(frozen=True)
class _Columns:
    """One shard as float64 tensors."""

    lengths: torch.Tensor
    ok: torch.Tensor
    ended: torch.Tensor
    group_ids: torch.Tensor
    scores: torch.Tensor
    engine_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None
    values: torch.Tensor | None

    @classmethod
    def of(cls, shard: ExperienceShard) -> _Columns:
        rollout = shard.rollout
        engine_logprobs = _float64(rollout.logprobs)
        return cls(
            lengths=torch.tensor(rollout.response_lengths, dtype=torch.int64),
            ok=torch.tensor(shard.rewards.ok),
            ended=torch.tensor(rollout.finish_reasons == FINISH_STOP),
            group_ids=torch.tensor(rollout.prompt_ids, dtype=torch.int64),
            scores=_float64(shard.rewards.scores),
            engine_logprobs=engine_logprobs,
            old_logprobs=engine_logprobs if shard.policy is None else _float64(shard.policy.data),
            reference_logprobs=None if shard.reference is None else _float64(shard.reference.data),
            values=None if shard.values is None else _float64(shard.values.data),
        )

    def token_mask(self, samples: torch.Tensor) -> torch.Tensor:
        """`[R]` bool: tokens of the samples where `samples` (`[B]` bool) is true."""
        return samples[segment_ids(self.lengths)]

    def kl(self, estimator: KLEstimator) -> torch.Tensor:
        """`[R]` nats against the reference; 0 without one and for failed samples."""
        if self.reference_logprobs is None:
            return torch.zeros_like(self.old_logprobs)
        estimate = kl_estimate(self.old_logprobs, self.reference_logprobs, estimator)
        return torch.where(self.token_mask(self.ok), estimate, 0.0)


def _float64(array: NDArray[np.floating]) -> torch.Tensor:
    # A copy: arrays out of the object store are read-only, which torch has no notion of.
    return torch.tensor(array, dtype=torch.float64)


def build_experience(
    shards: list[ExperienceShard],
    *,
    spec: ExperienceSpec,
    kl_coefficient: float,
    all_reduce: AllReduce = single_rank,
    dtype: torch.dtype = torch.float32,
) -> Experience:
    """Advantages, returns and statistics of one step.

    Args:
        shards: this rank's, with the same columns present in all of them and on all ranks. Samples of one prompt are in
            one shard.
        spec: how.
        kl_coefficient: β of this step.
        all_reduce: sums over ranks; called twice.
        dtype: of the resulting tensors. Everything before is computed in float64.

    Raises:
        ValueError: a column is missing that the specification needs, or present in some shards only.
    """
    _check_columns(shards, spec, kl_coefficient)
    columns = [_Columns.of(shard) for shard in shards]

    score_moments = sum((Moments.of(each.scores, each.ok) for each in columns), Moments(0, 0, 0)).reduced(all_reduce)

    advantages: list[torch.Tensor] = []
    returns: list[torch.Tensor | None] = []
    informative: list[torch.Tensor] = []
    advantage_moments = Moments(0, 0, 0)
    sums = torch.zeros(6, dtype=torch.float64)
    for each in columns:
        shaped = shape_scores(
            each.scores,
            each.ok,
            each.ended,
            clip=spec.score_clip,
            missing_eos_penalty=spec.missing_eos_penalty,
            whiten_moments=score_moments if spec.reward_whiten else None,
        )
        coefficient = kl_coefficient if spec.kl_in_reward else 0.0
        rewards = token_rewards(shaped, each.kl(spec.kl_estimator), each.lengths, coefficient)
        shard_advantages, shard_returns, mask = _advantages(each, rewards, spec)
        advantages.append(shard_advantages)
        returns.append(shard_returns)
        informative.append(mask)
        advantage_moments += Moments.of(shard_advantages, mask)
        sums += torch.stack(
            [
                torch.tensor(float(len(each.ok)), dtype=torch.float64),
                each.ok.sum().double(),
                each.lengths[each.ok].sum().double(),
                (each.ok & ~each.ended).sum().double(),
                rewards.sum(),
                each.kl("k1").sum(),
            ]
        )

    local = torch.cat([sums, torch.tensor(advantage_moments.vector(), dtype=torch.float64)])
    num_samples, num_valid, num_valid_tokens, truncated, reward_sum, kl_sum, *vector = all_reduce(local).tolist()
    advantage_moments = Moments(*vector)
    if spec.advantage_whiten:
        advantages = [whiten(each, mask, advantage_moments) for each, mask in zip(advantages, informative, strict=True)]

    def mean(total: float) -> float:
        return total / num_valid if num_valid else float("nan")

    def typed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return Experience(
        shards=[
            ShardExperience(
                lengths=each.lengths,
                ok=each.ok,
                weights=token_weights(each.lengths, each.ok, spec.loss_aggregation).to(dtype),
                old_logprobs=each.old_logprobs.to(dtype),
                engine_logprobs=each.engine_logprobs.to(dtype),
                reference_logprobs=typed(each.reference_logprobs),
                advantages=shard_advantages.to(dtype),
                values=typed(each.values),
                returns=typed(shard_returns),
            )
            for each, shard_advantages, shard_returns in zip(columns, advantages, returns, strict=True)
        ],
        stats=ExperienceStats(
            num_samples=int(num_samples),
            num_valid=int(num_valid),
            num_valid_tokens=int(num_valid_tokens),
            score_mean=score_moments.mean,
            score_std=score_moments.std,
            shaped_reward_mean=mean(reward_sum),
            kl_reference=None if any(each.reference_logprobs is None for each in columns) else mean(kl_sum),
            advantage_mean=advantage_moments.mean,
            advantage_std=advantage_moments.std,
            response_length_mean=mean(num_valid_tokens),
            truncated_fraction=mean(truncated),
        ),
    )


def _advantages(
    columns: _Columns, rewards: torch.Tensor, spec: ExperienceSpec
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`[R]` advantages before whitening, `[R]` returns of the critic, `[R]` bool where there is an advantage at all.

    A sample alone in its group has nothing to compare with: its advantage stays 0, and it is kept out of the whitening,
    which would give it the opposite of the mean.
    """
    if spec.advantage == "gae":
        assert columns.values is not None, "checked by _check_columns"
        mask = columns.token_mask(columns.ok)
        advantages, returns = gae(rewards, columns.values, columns.lengths, spec.gamma, spec.gae_lambda, mask)
        return advantages, returns, mask
    sequence_rewards = segment_sum(rewards, columns.lengths)
    compare = rloo if spec.advantage == "rloo" else grpo
    advantages = compare(sequence_rewards, columns.group_ids, columns.ok)[segment_ids(columns.lengths)]
    return advantages, None, columns.token_mask(comparable(columns.group_ids, columns.ok))


def _check_columns(shards: list[ExperienceShard], spec: ExperienceSpec, kl_coefficient: float) -> None:
    if spec.advantage not in ("gae", "rloo", "grpo"):
        raise ValueError(f"unknown advantage {spec.advantage!r}; one of gae, rloo, grpo")
    for index, shard in enumerate(shards):
        if spec.advantage == "gae" and shard.values is None:
            raise ValueError(f"shard {index} has no values, which gae needs")
        if kl_coefficient != 0 and shard.reference is None:
            raise ValueError(
                f"shard {index} has no reference log-probs, which a KL coefficient of {kl_coefficient} needs"
            )
        for name in ("reference", "policy", "values"):
            if (vars(shard)[name] is None) != (vars(shards[0])[name] is None):
                raise ValueError(f"shard {index} and shard 0 do not both have a {name} column")
