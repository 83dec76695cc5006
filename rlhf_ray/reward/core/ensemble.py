"""One reward out of many: heads for several attributes, and members of an ensemble.

Optimising against one reward model finds its mistakes. Members that were trained apart agree where the data
speaks and differ where they only extrapolate, so an objective that counts disagreement against a response keeps
the policy out of there (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization",
arXiv 2310.02743).

Arrays are `[..., A, K]` with A attributes and K members. Sums run over them one by one, in their order: NumPy's
own reductions choose an order by the shape of the whole array, and a score would depend on its batch by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

MemberAggregation = Literal["mean", "minimum", "mean_minus_variance"]


@dataclass(frozen=True)
class MemberScale:
    """Where each member's scores lie and how far they spread, over the pairs it was trained on.

    Attributes:
        offset: mean score of each of the K members.
        scale: standard deviation of each within a pair, above 0.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]


def fit_member_scale(chosen: ArrayLike, rejected: ArrayLike) -> MemberScale:
    """Mean of every member, and its standard deviation within pairs, `√(Σ (chosen − rejected)² / 2P)`.

    Comparisons tell nothing of how far scores to different prompts lie apart, so that is no part of the scale.

    Args:
        chosen, rejected: `[P, K]`, of the two responses of P training pairs.

    Raises:
        ValueError: a member gives both responses of every pair the same score, or one that is not finite.
    """
    sides = np.asarray([chosen, rejected], dtype=np.float64)
    offset, scale = sides.mean(axis=(0, 1)), np.sqrt(np.square(sides[0] - sides[1]).mean(axis=0) / 2)
    unusable = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if unusable.size:
        raise ValueError(f"member {unusable[0]} tells no response from another (spread {scale[unusable[0]]})")
    return MemberScale(tuple(offset.tolist()), tuple(scale.tolist()))


def standardise(scores: ArrayLike, scale: MemberScale) -> NDArray[np.float64]:
    """Scores of all members in one unit, standard deviations within a pair, from the member's mean in training.

    Comparisons fix neither the offset nor, with noisy labels, the scale of a score. Without this the minimum over
    members is the score of whichever member lies lowest, and the variance is that of the offsets.

    Args:
        scores: `[..., K]`.
    """
    return (np.asarray(scores, dtype=np.float64) - np.array(scale.offset)) / np.array(scale.scale)


def centre_within_groups(scores: ArrayLike, groups: ArrayLike) -> NDArray[np.float64]:
    """Take out where each member's scores of a prompt lie; their mean over the members stays.

    What a member adds to all responses to a prompt changes none of its preferences, so comparisons cannot identify it,
    and it is no disagreement about a response. With several responses to the prompt it can be seen and taken out.

    Args:
        scores: `[N, K]`, in one unit; rows that are not finite have no part in it.
        groups: `[N]`, equal for responses to the same prompt. One that is alone in its group stays as it is.

    Returns:
        `[N, K]`.
    """
    values = np.asarray(scores, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    counted = np.isfinite(values).all(axis=1)
    sizes = np.bincount(group, counted)
    sums = np.stack([np.bincount(group, np.where(counted, column, 0.0)) for column in values.T], axis=1)
    means = sums / np.maximum(sizes, 1)[:, None]
    offsets = np.where(sizes[:, None] > 1, means - _mean(means)[:, None], 0.0)
    return values - offsets[group]


def aggregate_attributes(scores: ArrayLike, weights: Sequence[float]) -> NDArray[np.float64]:
    """Weighted sum over attributes, `Σ_a weights[a] · scores[..., a, :]`, for each member.

    Args:
        scores: `[..., A, K]`.
        weights: `[A]`.

    Returns:
        `[..., K]`.

    Raises:
        ValueError: not as many weights as attributes.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(weights) != values.shape[-2]:
        raise ValueError(f"{len(weights)} weights for {values.shape[-2]} attributes")
    return _sum([weight * values[..., attribute, :] for attribute, weight in enumerate(weights)])


def aggregate_members(scores: ArrayLike, how: MemberAggregation, variance_weight: float = 0.0) -> NDArray[np.float64]:
    """One score out of those of the members (Coste et al. 2023, section 3).

    - `mean`: `1/K Σ_k s_k`.
    - `minimum`: `min_k s_k`, their worst-case optimisation (WCO).
    - `mean_minus_variance`: `mean − λ · 1/K Σ_k (s_k − mean)²`, their uncertainty-weighted optimisation (UWO). The
      variance is that of the population: one member has none.

    Args:
        scores: `[..., K]` in one unit, see `standardise`.
        variance_weight: λ, in 1/unit of the score; the other aggregations do not use it.

    Returns:
        `[...]`.
    """
    values = np.asarray(scores, dtype=np.float64)
    match how:
        case "mean":
            return _mean(values)
        case "minimum":
            return values.min(axis=-1)
        case "mean_minus_variance":
            return _mean(values) - variance_weight * _variance(values)
        case _:
            assert_never(how)


def disagreement(scores: ArrayLike) -> NDArray[np.float64]:
    """`[...]` (population) standard deviation over the members of `[..., K]`; exactly 0 for one member."""
    return np.sqrt(_variance(np.asarray(scores, dtype=np.float64)))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return _sum([values[..., member] for member in range(values.shape[-1])]) / values.shape[-1]


def _variance(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return _mean(np.square(values - _mean(values)[..., None]))


def _sum(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    # The sum over a list of arrays is element by element, whatever their shape.
    total: Any = reduce(np.add, columns)
    return np.asarray(total)
