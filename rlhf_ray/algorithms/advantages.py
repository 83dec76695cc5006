"""How much better an action was than expected: with a critic, against the other samples of a prompt, or neither.

`ESTIMATORS` has each one under its name in the settings; what it needs of a run is in `config.algorithm.ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rlhf_ray.algorithms.segments import Moments, group_sum, segment_ids, segment_sum
from rlhf_ray.config.algorithm import AlgorithmSettings

WHITEN_EPSILON = 1e-8


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 11-16).

    `A_t = Σ_l (γλ)^l δ_{t+l}` with `δ_t = r_t + γ V_{t+1} − V_t`; the episode ends at the last response token, where
    the next value is 0. Tokens outside the mask are stepped over as if the response did not contain them: their
    rewards and values, which may be anything, have no influence, and their advantage and return are 0.

    Args:
        rewards: `[R]`.
        values: `[R]`, the critic's value before each token.
        lengths: `[B]` response lengths.
        gamma: discount γ.
        gae_lambda: λ.
        mask: `[R]` bool, true for tokens that take part; None: all.

    Returns:
        `(advantages, returns)`, both `[R]`, with `returns = advantages + values`; computed in float64 and given back in
        the wider type of rewards and values.
    """
    sample = segment_ids(lengths)
    position = torch.arange(len(values), device=values.device) - (torch.cumsum(lengths, 0) - lengths)[sample]
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)

    # Time comes first, so that each turn of the loop reads consecutive memory. Padding counts as masked.
    shape = (int(lengths.max()) if len(lengths) else 0, len(lengths))

    def padded(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=flat.device).index_put((position, sample), flat.to(dtype))

    reward_rows, value_rows = padded(rewards, torch.float64), padded(values, torch.float64)
    mask_rows = padded(mask, torch.bool)
    advantage_rows = torch.zeros_like(value_rows)
    next_value = torch.zeros(shape[1], dtype=torch.float64, device=values.device)
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(shape[0])):
        delta = reward_rows[t] + gamma * next_value - value_rows[t]
        next_advantage = torch.where(mask_rows[t], delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(mask_rows[t], value_rows[t], next_value)
        advantage_rows[t] = next_advantage

    advantages = torch.where(mask, advantage_rows[position, sample], 0.0)
    returns = torch.where(mask, advantages + values.double(), 0.0)
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    return advantages.to(dtype), returns.to(dtype)


def return_to_go(
    rewards: torch.Tensor, lengths: torch.Tensor, gamma: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`[R]` discounted rewards from each token on, `A_t = Σ_l γ^l r_{t+l}` (REINFORCE++, Hu et al. 2025).

    The paper has the KL of the tokens to come in it, which is `kl.placement: reward`, and standardises over the step,
    which is `advantage_whiten`. Arguments as for `gae`, of which this is the case λ = 1 with a critic that says 0.
    """
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma, 1.0, mask)[0]


def comparable(group_ids: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
    """`[B]` bool: valid samples (`ok`) with at least one other valid sample in their group to compare with."""
    return ok & (group_sum(ok.long(), group_ids) >= 2)


def rloo(scores: torch.Tensor, group_ids: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
    """Leave-one-out advantages (Ahmadian et al. 2024): score minus the mean score of the others in the group.

    Args:
        scores: `[B]`; anything where not `ok`.
        group_ids: `[B]` int64, equal for samples of one prompt, which need not be neighbours.
        ok: `[B]` bool, valid samples. The others are nobody's baseline.

    Returns:
        `[B]` in the type of `scores`; 0 for samples that are not valid or have no other valid one in their group.
    """
    valid = torch.where(ok, scores.double(), 0.0)
    others = (group_sum(ok.double(), group_ids) - 1).clamp(min=1)
    baseline = (group_sum(valid, group_ids) - valid) / others
    return torch.where(comparable(group_ids, ok), valid - baseline, 0.0).to(scores.dtype)


def grpo(scores: torch.Tensor, group_ids: torch.Tensor, ok: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Group-standardised advantages (Shao et al. 2024, section 4.1.2): `(score − mean) / (std + epsilon)` of the group.

    The paper writes `std` without saying which; this is the unbiased one (n − 1), as in verl and TRL. Arguments and
    result as for `rloo`.
    """
    count = group_sum(ok.double(), group_ids)
    valid = torch.where(ok, scores.double(), 0.0)
    deviation = torch.where(ok, valid - group_sum(valid, group_ids) / count.clamp(min=1), 0.0)
    std = (group_sum(deviation.square(), group_ids) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(comparable(group_ids, ok), deviation / (std + epsilon), 0.0).to(scores.dtype)


def group_mean(scores: torch.Tensor, group_ids: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
    """Score minus the mean score of the group, without a standard deviation.

    Dr. GRPO (Liu et al. 2025, section 3.2) uses it as it is; the baseline form of REINFORCE++ (Hu et al. 2025)
    standardises it over the step, which is `advantage_whiten`. Arguments and result as for `rloo`, of which it is
    (n − 1) / n times.
    """
    valid = torch.where(ok, scores.double(), 0.0)
    baseline = group_sum(valid, group_ids) / group_sum(ok.double(), group_ids).clamp(min=1)
    return torch.where(comparable(group_ids, ok), valid - baseline, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class AdvantageInputs:
    """What advantages are made of.

    Attributes:
        rewards: `[R]`; 0 outside the mask.
        lengths: `[B]` response lengths.
        mask: `[R]` bool, tokens that the policy sampled, of valid samples.
        values: `[R]`; None without a critic.
        group_ids: `[B]` int64, equal for samples of one prompt.
        ok: `[B]` bool, valid samples.
    """

    rewards: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    values: torch.Tensor | None
    group_ids: torch.Tensor
    ok: torch.Tensor


@dataclass(frozen=True)
class Advantages:
    """What an estimator gives.

    Attributes:
        advantages: `[R]`, 0 outside the mask.
        returns: `[R]` targets of the critic; None without one.
        informative: `[R]` bool, tokens whose advantage means something, which whitening is over.
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None
    informative: torch.Tensor


Estimator = Callable[[AdvantageInputs, AlgorithmSettings], Advantages]


def _with_critic(inputs: AdvantageInputs, algorithm: AlgorithmSettings) -> Advantages:
    if inputs.values is None:
        raise ValueError("gae needs values")
    advantages, returns = gae(
        inputs.rewards, inputs.values, inputs.lengths, algorithm.gamma, algorithm.gae_lambda, inputs.mask
    )
    return Advantages(advantages, returns, inputs.mask)


def _alone(inputs: AdvantageInputs, algorithm: AlgorithmSettings) -> Advantages:
    advantages = return_to_go(inputs.rewards, inputs.lengths, algorithm.gamma, inputs.mask)
    return Advantages(advantages, None, inputs.mask)


def _against_group(compare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Estimator:
    """Every token of a response gets what its summed rewards are worth beside those of its group.

    A sample alone in its group has nothing to compare with: its advantage is 0, and it is kept out of the whitening,
    which would give it the opposite of the mean.
    """

    def estimate(inputs: AdvantageInputs, algorithm: AlgorithmSettings) -> Advantages:
        sample, group_ids, ok = segment_ids(inputs.lengths), inputs.group_ids, inputs.ok
        advantages = compare(segment_sum(inputs.rewards, inputs.lengths), group_ids, ok)[sample]
        return Advantages(
            torch.where(inputs.mask, advantages, 0.0), None, comparable(group_ids, ok)[sample] & inputs.mask
        )

    return estimate


ESTIMATORS: Mapping[str, Estimator] = {
    "gae": _with_critic,
    "rloo": _against_group(rloo),
    "grpo": _against_group(grpo),
    "group_mean": _against_group(group_mean),
    "return_to_go": _alone,
}


def in_uniform_group(scores: torch.Tensor, group_ids: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
    """`[B]` bool: samples of groups that say nothing, because all their scores are equal, or there is but one: every
    advantage is 0.

    What dynamic sampling leaves out (DAPO, Yu et al. 2025, eq. 11). Arguments as for `rloo`.
    """
    compared = comparable(group_ids, ok)
    groups, index = torch.unique(group_ids[compared], return_inverse=True)
    bounds = scores.new_zeros(len(groups))
    lowest, highest = (
        bounds.scatter_reduce(0, index, scores[compared], reduce, include_self=False) for reduce in ("amin", "amax")
    )
    return (ok & ~compared).masked_scatter(compared, (lowest == highest)[index])


def whiten(values: torch.Tensor, mask: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Standardised `values`, with the moments of all ranks; 0 outside the mask, whatever stands there.

    Args:
        values: any shape.
        mask: bool, same shape.
        moments: of the masked values on all ranks.
    """
    return torch.where(mask, (values - moments.mean) / (moments.variance + WHITEN_EPSILON) ** 0.5, 0.0)
