"""How much better an action was than expected: with a critic (GAE) or against the other samples of a prompt."""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.segments import Moments, segment_ids

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


def _group_sum(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """`[B]` sum of `values` over the group of each sample."""
    groups, index = torch.unique(group_ids, return_inverse=True)
    return torch.zeros(len(groups), dtype=values.dtype, device=values.device).index_add(0, index, values)[index]


def comparable(group_ids: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
    """`[B]` bool: valid samples (`ok`) with at least one other valid sample in their group to compare with."""
    return ok & (_group_sum(ok.long(), group_ids) >= 2)


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
    others = (_group_sum(ok.double(), group_ids) - 1).clamp(min=1)
    baseline = (_group_sum(valid, group_ids) - valid) / others
    return torch.where(comparable(group_ids, ok), valid - baseline, 0.0).to(scores.dtype)


def grpo(scores: torch.Tensor, group_ids: torch.Tensor, ok: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Group-standardised advantages (Shao et al. 2024, section 4.1.2): `(score − mean) / (std + epsilon)` of the group.

    The paper writes `std` without saying which; this is the unbiased one (n − 1), as in verl and TRL. Arguments and
    result as for `rloo`.
    """
    count = _group_sum(ok.double(), group_ids)
    valid = torch.where(ok, scores.double(), 0.0)
    deviation = torch.where(ok, valid - _group_sum(valid, group_ids) / count.clamp(min=1), 0.0)
    std = (_group_sum(deviation.square(), group_ids) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(comparable(group_ids, ok), deviation / (std + epsilon), 0.0).to(scores.dtype)


def whiten(values: torch.Tensor, mask: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Standardised `values`, with the moments of all ranks; 0 outside the mask, whatever stands there.

    Args:
        values: any shape.
        mask: bool, same shape.
        moments: of the masked values on all ranks.
    """
    return torch.where(mask, (values - moments.mean) / (moments.variance + WHITEN_EPSILON) ** 0.5, 0.0)
