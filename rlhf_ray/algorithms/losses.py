"""Losses of policy and critic, and what is measured beside them.

Losses are sums of weighted per-token values, never averages. The caller divides once, by the normalizer of the whole
minibatch over all ranks, so how a minibatch is cut into micro-batches or packs changes nothing. A token of weight 0 has
no influence whatever its values are, also where they are not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_ray.algorithms.segments import AllReduce, Moments, segment_ids, single_rank
from rlhf_ray.config.algorithm import AlgorithmSettings

MAX_LOG_RATIO = 20.0
"""Ratios are taken as e^20 at the most (and e^-20 at the least), without gradient beyond: far outside of any clip, and
far from what float32 can hold. An infinite ratio turns into NaN wherever it meets a 0, at the latest in the backward
pass."""


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the tokens of one micro-batch; scalars, of which only `loss_sum` carries a gradient.

    Attributes:
        loss_sum: weighted clipped surrogate, to be minimised.
        clip_fraction_sum: weight of the tokens where clipping is active and so the gradient is zero.
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


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    algorithm: AlgorithmSettings,
    importance_weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), `−min(r A, clip(r, 1 − low, 1 + high) A)` a token.

    Separate bounds as in DAPO (Yu et al. 2025, "clip-higher"). The dual clip (Ye et al. 2020) bounds the loss of a
    negative advantage at `−c A`, where a large ratio would make it unbounded.

    Args:
        logprobs: `[R]` under the policy in training; carries the gradient.
        old_logprobs: `[R]` under the policy that the ratio is taken to.
        advantages: `[R]`.
        weights: `[R]` from `token_weights`.
        algorithm: `clip_low`, `clip_high` and `dual_clip`.
        importance_weights: `[R]` from `truncated_importance_weights`, multiply the loss; None: 1.
    """
    active = weights != 0
    advantages = _counted(advantages, active)
    distance = _counted(logprobs, active) - _counted(old_logprobs, active)
    log_ratio = distance.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if algorithm.dual_clip is not None:
        bound = -advantages * algorithm.dual_clip
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
        is_clipped = is_clipped | is_bounded
    if importance_weights is not None:
        loss = loss * _counted(importance_weights, active)

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
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


def token_weights(lengths: torch.Tensor, ok: torch.Tensor, aggregation: Literal["token", "sequence"]) -> torch.Tensor:
    """Weights that turn a sum over tokens into the wanted mean, once it is divided by the sum of the weights.

    `token`: 1 each, so the result is the mean over all tokens. `sequence`: 1 / length, so it is the mean over
    sequences of each one's token mean.

    Args:
        lengths: `[B]` response lengths.
        ok: `[B]` bool; tokens of the other samples weigh 0.
        aggregation: which mean.

    Returns:
        `[R]` float32.
    """
    if aggregation == "token":
        each = ok.float()
    elif aggregation == "sequence":
        each = ok.float() / lengths
    else:
        raise ValueError(f"unknown loss aggregation {aggregation!r}; one of token, sequence")
    return each[segment_ids(lengths)]


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


def truncated_importance_weights(
    learner_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """`[R]` `min(π_learner / π_engine, cap)`, without gradient (truncated importance sampling, Yao et al. 2025).

    Corrects for the engine, which samples from a slightly different distribution than the learner computes.

    Args:
        learner_logprobs: `[R]` of the sampled tokens, recomputed by the learner before its first update.
        engine_logprobs: `[R]` as the engine gave them.
        cap: largest weight.
    """
    return (learner_logprobs - engine_logprobs).detach().exp().clamp(max=cap)


def mismatch(learner_logprobs: torch.Tensor, engine_logprobs: torch.Tensor) -> Mismatch:
    """Distance between learner's and engine's log-probs (`[R]` each) of the same tokens under the same weights."""
    log_ratio = learner_logprobs.detach().double() - engine_logprobs.detach().double()
    distance = log_ratio.abs()
    return Mismatch(
        kl_sum=(torch.expm1(log_ratio) - log_ratio).sum(),
        max_abs=distance.max() if len(distance) else distance.new_zeros(()),
        ratio_sum=distance.exp().sum(),
    )
