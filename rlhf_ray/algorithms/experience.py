"""The one place where rows and columns become advantages, shared by the policy learner and the critic learner.

Both learners must see the same numbers, so both call `build_experience` with the same columns. What is computed across
samples reaches over one shard at most (the samples of a prompt are never split over shards) or goes through
`all_reduce` as a sum, so the result does not depend on how the shards are spread over ranks, apart from the order of
floating-point additions. A sample whose reward failed has no part in anything: not in a baseline, not in a moment, not
in a mean, and its tokens weigh 0 in the losses. Nor has a token that the policy did not sample (`Rollout.loss_mask`):
lengths, sums and means are over the tokens that it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms.advantages import ESTIMATORS, AdvantageInputs, in_uniform_group, whiten
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.losses import normalizer_weights, token_weights
from rlhf_ray.algorithms.rewards import length_penalty, rescale_by_length, shape_scores, token_rewards
from rlhf_ray.algorithms.segments import AllReduce, Moments, segment_counts, segment_ids, single_rank
from rlhf_ray.config.algorithm import ADVANTAGES, AlgorithmSettings
from rlhf_ray.rollout import FINISH_STOP, RewardColumn, Rollout, TokenColumn, TrunkColumn


@dataclass(frozen=True)
class ExperienceShard:
    """One rollout and its columns, as they come out of the object store.

    Attributes:
        rollout: the rows.
        rewards: a score or a failure for each sample.
        reference: log-probs of the reference; None without one.
        values: the critic's values; None without a critic.
        policy: the learner's own log-probs before its first update; None unless `algorithm.asks_old_logprobs`.
        trunk: hidden states that a learner's forward passes begin with; None: they begin at the embedding.
    """

    rollout: Rollout
    rewards: RewardColumn
    reference: TokenColumn | None = None
    values: TokenColumn | None = None
    policy: TokenColumn | None = None
    trunk: TrunkColumn | None = None

    def __post_init__(self) -> None:
        if len(self.rewards.scores) != self.rollout.num_samples:
            raise ValueError(f"{len(self.rewards.scores)} scores for {self.rollout.num_samples} samples")
        for name, column in (("reference", self.reference), ("values", self.values), ("policy", self.policy)):
            if column is not None and column.data.shape != self.rollout.logprobs.shape:
                raise ValueError(f"{name}: column of shape {column.data.shape} for {len(self.rollout.logprobs)} tokens")


@dataclass(frozen=True)
class ExperienceStats:
    """Statistics of the step over all ranks. Means are over valid samples, and NaN where there are none.

    Attributes:
        num_samples: all samples.
        num_valid: samples with a score.
        num_valid_tokens: their response tokens that the policy sampled.
        shaped_reward_mean: mean over sequences of the summed token rewards, what the advantages are made of: the shaped
            score, less β·KL where the penalty is in the reward.
        kl_reference: mean over sequences of the summed per-token k1 of old log-probs against the reference, nats; None
            without a reference or old log-probs.
        advantage_mean: over tokens, before whitening.
        advantage_std: over tokens, before whitening.
        response_length_mean: tokens.
        truncated_fraction: share of responses that did not end by themselves.
        num_masked: valid samples left out of the policy loss because they were cut off.
    """

    num_samples: int
    num_valid: int
    num_valid_tokens: int
    shaped_reward_mean: float
    kl_reference: float | None
    advantage_mean: float
    advantage_std: float
    response_length_mean: float
    truncated_fraction: float
    num_masked: int


@dataclass(frozen=True)
class Experience:
    """What the losses need of all shards of a rank, flat in their order, and the statistics of all ranks.

    Attributes:
        lengths: `[B]` int64 response lengths.
        ok: `[B]` bool, samples with a score.
        masked: `[B]` bool, those of them that the policy loss leaves out because they were cut off.
        uniform: `[B]` bool, those that it leaves out because the scores of their group are all equal.
        samples: `[R]` int64, which sample each token belongs to.
        sampled: `[R]` bool, tokens that the policy sampled.
        counted: `[R]` bool, those of samples with a score.
        weights: `[R]` of the policy loss, 0 for what has no part in it; see `token_weights`.
        normalizer: `[R]` what each token adds to what the policy loss is divided by; see `normalizer_weights`.
        value_weights: `[R]` of the critic's loss, which is divided by their sum. They are the policy's, except that the
            critic also learns from samples that the policy leaves out.
        engine_logprobs: `[R]` as the engine gave them.
        old_logprobs: `[R]` what the ratio is taken to; None where that is what the training pass itself computes.
        reference_logprobs: `[R]`, or None.
        advantages: `[R]`, whitened if so specified; 0 for failed samples.
        values: `[R]` old values, or None.
        returns: `[R]` targets of the critic, never whitened, or None without values; 0 for failed samples.
        stats: of the step, over all ranks.
    """

    lengths: torch.Tensor
    ok: torch.Tensor
    masked: torch.Tensor
    uniform: torch.Tensor
    samples: torch.Tensor
    sampled: torch.Tensor
    counted: torch.Tensor
    weights: torch.Tensor
    normalizer: torch.Tensor
    value_weights: torch.Tensor
    engine_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None
    reference_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    values: torch.Tensor | None
    returns: torch.Tensor | None
    stats: ExperienceStats

    def to(self, device: torch.device, dtype: torch.dtype) -> Experience:
        """Tensors on a device, floating-point ones in a type."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(
            self,
            **{
                name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for name, value in tensors.items()
            },
        )


def build_experience(
    shards: Sequence[ExperienceShard],
    algorithm: AlgorithmSettings,
    kl_coefficient: float,
    max_response_tokens: int,
    all_reduce: AllReduce = single_rank,
) -> Experience:
    """Advantages, returns and statistics of one step, in float64.

    Args:
        shards: this rank's, at least one, with the same columns present in all of them and on all ranks. Samples of one
            prompt are in one shard.
        algorithm: how.
        kl_coefficient: β of this step.
        max_response_tokens: where responses were cut off.
        all_reduce: sums over ranks; called twice.

    Raises:
        ValueError: a column is missing that the algorithm needs, or present in some shards only.
    """
    _check_columns(shards, algorithm, kl_coefficient)
    rollouts = [shard.rollout for shard in shards]
    lengths = _joined([rollout.response_lengths for rollout in rollouts], torch.int64)
    group_ids = _joined([rollout.prompt_ids for rollout in rollouts], torch.int64)
    ended = _joined([rollout.finish_reasons == FINISH_STOP for rollout in rollouts], torch.bool)
    ok = _joined([shard.rewards.ok for shard in shards], torch.bool)
    scores = _joined([shard.rewards.scores for shard in shards])
    engine_logprobs = _joined([rollout.logprobs for rollout in rollouts])
    reference_logprobs = _column([shard.reference for shard in shards])
    values = _column([shard.values for shard in shards])
    old_logprobs = _column([shard.policy for shard in shards])
    if old_logprobs is None and algorithm.old_logprobs == "engine":
        old_logprobs = engine_logprobs
    samples = segment_ids(lengths)
    sampled = _joined([rollout.sampled() for rollout in rollouts], torch.bool)
    counted = sampled & ok[samples]
    sampled_lengths = segment_counts(sampled, lengths)

    def kl(estimator: Any) -> torch.Tensor:
        """`[R]` nats against the reference; 0 where it is not known and for tokens that do not count."""
        if reference_logprobs is None or old_logprobs is None:
            return torch.zeros_like(engine_logprobs)
        return torch.where(counted, kl_estimate(old_logprobs, reference_logprobs, estimator), 0.0)

    score_moments = Moments.of(scores, ok).reduced(all_reduce)
    rescaled = rescale_by_length(scores, ok, sampled_lengths, group_ids, algorithm.length.rescale)
    shaped = shape_scores(rescaled, ok, ended, algorithm, score_moments)
    shaped = shaped - torch.where(ok, length_penalty(sampled_lengths, algorithm.length, max_response_tokens), 0.0)
    in_reward = kl_coefficient if algorithm.kl.placement == "reward" else 0.0
    rewards = token_rewards(shaped, kl(algorithm.kl.estimator), lengths, in_reward, sampled)
    estimated = ESTIMATORS[algorithm.advantage](
        AdvantageInputs(rewards, lengths, counted, values, group_ids, ok), algorithm
    )

    cut = ok & ~ended if algorithm.mask_truncated else torch.zeros_like(ok)
    uniform = in_uniform_group(scores, group_ids, ok)
    dropped = uniform & ~cut if algorithm.drop_uniform_groups else torch.zeros_like(ok)
    kept = ~(cut | dropped)
    value_weights = token_weights(lengths, counted, algorithm.loss_aggregation)
    weights = torch.where(kept[samples], value_weights, 0.0)
    advantages, informative = estimated.advantages, estimated.informative & kept[samples]

    counts = [len(ok), ok.sum(), sampled_lengths[ok].sum(), (ok & ~ended).sum(), cut.sum()]
    sums = [*counts, rewards.sum(), kl("k1").sum()]
    local = torch.tensor([*map(float, sums), *Moments.of(advantages, informative).vector()], dtype=torch.float64)
    reduced = all_reduce(local).tolist()
    num_samples, num_valid, num_valid_tokens, truncated, num_masked, reward_sum, kl_sum = reduced[: len(sums)]
    advantage_moments = Moments(*reduced[len(sums) :])
    if algorithm.advantage_whiten:
        advantages = whiten(advantages, informative, advantage_moments)

    def mean(total: float) -> float:
        return total / num_valid if num_valid else float("nan")

    return Experience(
        lengths=lengths,
        ok=ok,
        masked=cut,
        uniform=dropped,
        samples=samples,
        sampled=sampled,
        counted=counted,
        weights=weights,
        normalizer=normalizer_weights(weights, lengths, algorithm.loss_aggregation, max_response_tokens),
        value_weights=value_weights,
        engine_logprobs=engine_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        advantages=advantages,
        values=values,
        returns=estimated.returns,
        stats=ExperienceStats(
            num_samples=int(num_samples),
            num_valid=int(num_valid),
            num_valid_tokens=int(num_valid_tokens),
            shaped_reward_mean=mean(reward_sum),
            kl_reference=None if reference_logprobs is None or old_logprobs is None else mean(kl_sum),
            advantage_mean=advantage_moments.mean,
            advantage_std=advantage_moments.std,
            response_length_mean=mean(num_valid_tokens),
            truncated_fraction=mean(truncated),
            num_masked=int(num_masked),
        ),
    )


def _joined(arrays: Sequence[NDArray[Any]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(np.concatenate(arrays), dtype=dtype)


def _column(columns: Sequence[TokenColumn | None]) -> torch.Tensor | None:
    present = [column.data for column in columns if column is not None]
    return _joined(present) if present else None


def _check_columns(shards: Sequence[ExperienceShard], algorithm: AlgorithmSettings, kl_coefficient: float) -> None:
    needed = {
        "values": ADVANTAGES[algorithm.advantage].critic,
        "reference": kl_coefficient != 0,
        "policy": algorithm.asks_old_logprobs,
    }
    for index, shard in enumerate(shards):
        for name, is_needed in needed.items():
            if is_needed and vars(shard)[name] is None:
                raise ValueError(f"shard {index} has no {name} column, which the algorithm needs")
            if (vars(shard)[name] is None) != (vars(shards[0])[name] is None):
                raise ValueError(f"shard {index} and shard 0 do not both have a {name} column")
