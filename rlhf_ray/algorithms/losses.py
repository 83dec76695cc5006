"""Losses of policy and critic, and what is measured beside them.

Losses are sums of weighted per-token values, never averages. The caller divides once, by the normalizer of the whole
minibatch over all ranks, so how a minibatch is cut into micro-batches or packs changes nothing. A token of weight 0 has
no influence whatever its values are, also where they are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_ray.algorithms.segments import (
    AllReduce,
    Moments,
    segment_counts,
    segment_ids,
    segment_sum,
    single_rank,
)
from rlhf_ray.config.algorithm import AlgorithmSettings

MAX_LOG_RATIO = 20.0
"""Ratios are taken as e^20 at the most (and e^-20 at the least), without gradient beyond: far outside of any clip, and
far from what float32 can hold. An infinite ratio turns into NaN wherever it meets a 0, at the latest in the backward
pass."""


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the tokens of one micro-batch; scalars, of which only `loss_sum` carries a gradient.

    Attributes:
        loss_sum: weighted surrogate, to be minimised.
        clip_fraction_sum: weight of the tokens where clipping is active.
        approx_kl_sum: weighted k3 estimate of KL(old || new), `(r − 1) − log r`, nats; never negative.
        ratio_sum: weighted probability ratio r = new / old.
        max_abs_log_ratio: largest |log r|; the maximum, not the sum, is what adds up over micro-batches.
    """

    loss_sum: torch.Tensor
    clip_fraction_sum: torch.Tensor
    approx_kl_sum: torch.Tensor
    ratio_sum: torch.Tensor
    max_abs_log_ratio: torch.Tensor


@dataclass(frozen=True)
class ValueLoss:
    """Sums over the tokens of one micro-batch; scalars, of which only `loss_sum` carries a gradient.

    Attributes:
        loss_sum: weighted half squared error, to be minimised.
        clip_fraction_sum: weight of the tokens where the clipped error is the larger one.
    """

    loss_sum: torch.Tensor
    clip_fraction_sum: torch.Tensor


@dataclass(frozen=True)
class Mismatch:
    """How far two computations of the same log-probs are apart; float64 scalars.

    Attributes:
        kl_sum: sum of the k3 estimate of KL(engine || learner), nats.
        max_abs: largest |Δ log-prob|.
        ratio_sum: sum of exp|Δ log-prob|.
    """

    kl_sum: torch.Tensor
    max_abs: torch.Tensor
    ratio_sum: torch.Tensor


def _counted(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """`values` in at least float32, and 0 where they do not count: 0 · NaN arises neither forward nor backward."""
    return torch.where(active, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)


def clipped_surrogate(
    logprobs: torch.Tensor, log_ratios: torch.Tensor, advantages: torch.Tensor, algorithm: AlgorithmSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), `−min(r A, clip(r, 1 − low, 1 + high) A)` a token.

    Separate bounds as in DAPO (Yu et al. 2025, "clip-higher"). The dual clip (Ye et al. 2020) bounds the loss of a
    negative advantage at `−c A`, where a large ratio would make it unbounded.

    Args:
        logprobs: `[R]` under the policy in training.
        log_ratios: `[R]` log r, with the gradient.
        advantages: `[R]`.
        algorithm: `clip_low`, `clip_high` and `dual_clip`.

    Returns:
        `[R]` losses, and `[R]` bool where clipping is active and so the gradient is zero.
    """
    ratio = log_ratios.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if algorithm.dual_clip is not None:
        bound = -advantages * algorithm.dual_clip
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
        is_clipped = is_clipped | is_bounded
    return loss, is_clipped


def clipped_weight(
    logprobs: torch.Tensor, log_ratios: torch.Tensor, advantages: torch.Tensor, algorithm: AlgorithmSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (MiniMax-M1, Chen et al. 2025, section 3.1, eq. 4-5), `−sg(clip(r, 1 − low, 1 + high)) A log π` a token.

    The clipped ratio is a constant weight, so that every token keeps a gradient: also one whose ratio is outside.
    Arguments as for `clipped_surrogate`; the second result is where the weight is clipped.
    """
    ratio = log_ratios.detach().exp()
    weight = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    return -weight * advantages * logprobs, weight != ratio


@dataclass(frozen=True)
class PolicyLossRule:
    """One entry of `POLICY_LOSSES`.

    Attributes:
        surrogate: a token's loss; see `clipped_surrogate`.
        by_sequence: the ratio is that of the token's sequence, `sequence_log_ratios`.
    """

    surrogate: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, AlgorithmSettings], tuple[torch.Tensor, torch.Tensor]
    ]
    by_sequence: bool = False


POLICY_LOSSES: Mapping[str, PolicyLossRule] = {
    "ppo": PolicyLossRule(clipped_surrogate),
    "gspo": PolicyLossRule(clipped_surrogate, by_sequence=True),
    "cispo": PolicyLossRule(clipped_weight),
}
"""Every loss of the policy by its name in the settings."""


def sequence_log_ratios(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, active: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """`[R]` log of the sequence ratio of GSPO (Zheng et al. 2025, arXiv 2507.18071v2, eq. 7): the mean of log r over a
    sequence's tokens, for each of them. Without gradient.

    Args:
        logprobs: `[R]` under the policy in training.
        old_logprobs: `[R]`.
        active: `[R]` bool; the others may hold anything, and have no part in a mean.
        sequences: `[S]` lengths of the whole sequences that the tokens make up.
    """
    log_ratios = torch.where(active, logprobs - old_logprobs, 0.0).detach()
    means = segment_sum(log_ratios, sequences) / segment_counts(active, sequences).clamp(min=1)
    return means[segment_ids(sequences)]


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    algorithm: AlgorithmSettings,
    importance_weights: torch.Tensor | None = None,
    sequence_ratios: torch.Tensor | None = None,
) -> PolicyLoss:
    """Weighted sum of the chosen loss over tokens, and what is measured beside it, by token whichever loss it is.

    With a sequence ratio s, a token's loss has the value of s and the gradient of its own log-prob: r is
    `sg(s) · π / sg(π)` (GSPO-token, Zheng et al. 2025, eq. 13-14). Where advantage and weight are the same for all
    tokens of a sequence, sum and gradient are those of the sequence form (eq. 5, 10), so tokens can be summed in any
    partition.

    Args:
        logprobs: `[R]` under the policy in training; carries the gradient.
        old_logprobs: `[R]` under the policy that the ratio is taken to.
        advantages: `[R]`.
        weights: `[R]` from `token_weights`.
        algorithm: `policy_loss`, and what it needs.
        importance_weights: `[R]` multiply the loss (`off_policy.py`); None: 1.
        sequence_ratios: `[R]` from `sequence_log_ratios`, for a loss by sequence.

    Raises:
        ValueError: a loss by sequence has no sequence ratios.
    """
    rule = POLICY_LOSSES[algorithm.policy_loss]
    active = weights != 0
    logprobs, advantages = _counted(logprobs, active), _counted(advantages, active)
    distance = logprobs - _counted(old_logprobs, active)
    log_ratio = distance.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    surrogate_log_ratio = log_ratio
    if rule.by_sequence:
        if sequence_ratios is None:
            raise ValueError(f"'{algorithm.policy_loss}' needs the ratios of sequences")
        own_gradient = logprobs - logprobs.detach()
        surrogate_log_ratio = (sequence_ratios + own_gradient).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss, is_clipped = rule.surrogate(logprobs, surrogate_log_ratio, advantages, algorithm)
    if importance_weights is not None:
        loss = loss * _counted(importance_weights, active)

    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    # Rounding can make `ratio - 1 - log_ratio` negative; expm1 keeps the digits that decide it.
    approx_kl = torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(
        loss_sum=(weights * loss).sum(),
        clip_fraction_sum=(weights * is_clipped).sum(),
        approx_kl_sum=(weights * approx_kl).sum(),
        ratio_sum=(weights * ratio).sum(),
        max_abs_log_ratio=distance.detach().abs().max() if len(distance) else distance.new_zeros(()),
    )


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, clip: float | None
) -> ValueLoss:
    """`0.5 · max((V − R)², (V_clipped − R)²)` a token, with `V_clipped` within ± `clip` of the old value.

    As in PPO2 of OpenAI Baselines.

    Args:
        values: `[R]` of the critic in training; carries the gradient.
        old_values: `[R]` at the start of the step.
        returns: `[R]`.
        weights: `[R]` from `token_weights`.
        clip: None: no clipping.
    """
    active = weights != 0
    values, old_values, returns = (_counted(each, active) for each in (values, old_values, returns))
    error = (values - returns).square()
    if clip is None:
        return ValueLoss((weights * 0.5 * error).sum(), error.new_zeros(()))
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    is_clipped = (clipped_error > error).detach()
    return ValueLoss((weights * 0.5 * torch.maximum(error, clipped_error)).sum(), (weights * is_clipped).sum())


Aggregation = Literal["token", "sequence", "constant"]


def token_weights(lengths: torch.Tensor, counted: torch.Tensor, aggregation: Aggregation) -> torch.Tensor:
    """Weights that turn a sum over tokens into the wanted mean, once it is divided by the sum of the normalizer's.

    `token`: 1 each, so the result is the mean over all tokens. `sequence`: 1 / tokens of the sequence, so it is the
    mean over sequences of each one's token mean. `constant`: 1 each, over a `normalizer_weights` of its own.

    Args:
        lengths: `[B]` response lengths.
        counted: `[R]` bool; the other tokens weigh 0, and are none of their sequence's.
        aggregation: which mean.

    Returns:
        `[R]` float32.
    """
    if aggregation in ("token", "constant"):
        return counted.float()
    if aggregation == "sequence":
        return counted.float() / segment_counts(counted, lengths).clamp(min=1)[segment_ids(lengths)]
    raise ValueError(f"unknown loss aggregation {aggregation!r}; one of token, sequence, constant")


def normalizer_weights(
    weights: torch.Tensor, lengths: torch.Tensor, aggregation: Aggregation, max_response_tokens: int
) -> torch.Tensor:
    """`[R]` what each token adds to what a minibatch's loss is divided by.

    Its weight, except with `constant`: there every sequence adds `max_response_tokens`, however long it is, so that a
    token's gradient does not depend on the lengths (Dr. GRPO, Liu et al. 2025, section 3.2).

    Args:
        weights: `[R]` from `token_weights`, 0 for what has no part in the loss.
        lengths: `[B]` response lengths.
        aggregation: which mean.
        max_response_tokens: where responses are cut off.
    """
    if aggregation != "constant":
        return weights
    counted = weights != 0
    shares = max_response_tokens / segment_counts(counted, lengths).clamp(min=1)
    return torch.where(counted, shares[segment_ids(lengths)], 0.0)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, all_reduce: AllReduce = single_rank
) -> float:
    """`1 − Var(returns − values) / Var(returns)` over the masked tokens of all ranks.

    1 is a perfect critic, 0 one that knows no more than the mean return, negative a harmful one; NaN where the returns
    do not vary.

    Args:
        values: `[R]` before the update.
        returns: `[R]`.
        mask: `[R]` bool.
        all_reduce: sums over ranks; called once.
    """
    error, target = Moments.of(returns.double() - values.double(), mask), Moments.of(returns, mask)
    sums = all_reduce(torch.tensor(error.vector() + target.vector(), dtype=torch.float64)).tolist()
    error, target = Moments(*sums[:3]), Moments(*sums[3:])
    return 1 - error.variance / target.variance if target.variance > 0 else math.nan


def mismatch(
    learner_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, sampled: torch.Tensor | None = None
) -> Mismatch:
    """Distance between learner's and engine's log-probs (`[R]` each) of the same tokens under the same weights.

    Args:
        sampled: `[R]` bool, tokens that the policy sampled; the others may hold anything. None: all.
    """
    log_ratio = learner_logprobs.detach().double() - engine_logprobs.detach().double()
    distance, ratio = log_ratio.abs(), log_ratio.abs().exp()
    if sampled is not None:
        log_ratio, distance, ratio = (torch.where(sampled, each, 0.0) for each in (log_ratio, distance, ratio))
    return Mismatch(
        kl_sum=(torch.expm1(log_ratio) - log_ratio).sum(),
        max_abs=distance.max() if len(distance) else distance.new_zeros(()),
        ratio_sum=ratio.sum(),
    )
