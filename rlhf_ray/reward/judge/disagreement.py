"""Does an ensemble know when it is wrong? Disagreement of the members against errors of the whole.

Disagreement that does not foretell errors protects nothing: taking the minimum over members, or subtracting the
variance, then only adds noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata, spearmanr

from rlhf_ray.reward.judge.groups import UNKNOWN, Estimate, Groups, Proportion


@dataclass(frozen=True)
class DisagreementBand:
    """Pairs with a disagreement in [low, high), the last band with both its ends."""

    low: float
    high: float
    accuracy: Proportion


@dataclass(frozen=True)
class RiskPoint:
    """Share of wrong pairs (risk) among the `coverage` of pairs with the least disagreement."""

    coverage: float
    risk: float


@dataclass(frozen=True)
class DisagreementReport:
    """How well disagreement foretells errors; none where it is undefined (no error, all wrong, or no variation).

    Attributes:
        auroc: probability that a wrong pair has more disagreement than a right one; one half is chance.
        spearman: rank correlation of disagreement with being wrong.
        bands: accuracy by quintile of disagreement, from the least; fewer where values repeat.
        risk_coverage: from the smallest coverage to 1, where the risk is the overall error rate.
        pairs, errors: counts.
    """

    auroc: Estimate
    spearman: float | None
    bands: tuple[DisagreementBand, ...]
    risk_coverage: tuple[RiskPoint, ...]
    pairs: int
    errors: int


def disagreement_against_error(
    disagreement: ArrayLike, credit: ArrayLike, groups: Groups, *, bands: int = 5, points: int = 10
) -> DisagreementReport:
    """Compare the disagreement about each pair with whether the aggregated score got the pair right.

    Args:
        disagreement: `[P]`, such as the standard deviation over members of their score difference. Only its order
            counts.
        credit: `[P]`, with at least one that is not NaN (a tie in the label, which is left out); below 1 is not right.
        groups: of the pairs.
        bands: of about as many pairs each.
        points: of the risk-coverage curve, at coverage 1/points, 2/points … 1.
    """
    values, credits = np.asarray(disagreement, dtype=np.float64), np.asarray(credit, dtype=np.float64)
    decided = ~np.isnan(credits)
    if values.ndim != 1 or values.shape != credits.shape or not decided.any():
        raise ValueError(f"disagreement and credit have shapes {values.shape} and {credits.shape}, not P ≥ 1")
    if not np.isfinite(values).all():
        raise ValueError("a disagreement is not finite")
    right = np.where(decided, credits == 1, np.nan)
    kept, correct = values[decided], right[decided] == 1
    return DisagreementReport(
        auroc=auroc(values, right == 0, right == 1, groups),
        spearman=_spearman(kept, ~correct),
        bands=_accuracy_bands(values, right, bands, groups),
        risk_coverage=_risk_coverage(kept, correct, points),
        pairs=len(kept),
        errors=int((~correct).sum()),
    )


def auroc(
    values: NDArray[np.float64], positive: NDArray[np.bool_], negative: NDArray[np.bool_], groups: Groups
) -> Estimate:
    """P(positive > negative) + P(equal)/2, by the placements of DeLong et al. 1988, within [0, 1].

    With m positives and k negatives, and ranks in the whole and within each class, the placements
    V₁₀ = (rank − rank among positives)/k and V₀₁ = 1 − (rank − rank among negatives)/m have the area A as their mean.
    (V₁₀ − A)/m and (V₀₁ − A)/k are what each pair adds to it (Obuchowski 1997 for groups). The interval is Wilson's, by
    the groups of the rarer class; with less than two there is none.

    Args:
        values: `[P]`.
        positive, negative: `[P]`, not both.
        groups: of the pairs.
    """
    m, k = int(positive.sum()), int(negative.sum())
    if not m or not k:
        return UNKNOWN
    ranks = rankdata(np.concatenate([values[positive], values[negative]]))
    above = (ranks[:m] - rankdata(values[positive])) / k
    below = 1 - (ranks[m:] - rankdata(values[negative])) / m
    area = float(above.mean())
    influence = np.zeros(len(values))
    influence[positive], influence[negative] = (above - area) / m, (below - area) / k
    # A thousand right pairs beside three wrong ones tell where three lie.
    effective = min(groups.effective(side.astype(np.float64)) for side in (positive, negative))
    return groups.wilson(area, influence, effective) if effective >= 2 else Estimate(area, None, None)


def _spearman(values: NDArray[np.float64], wrong: NDArray[np.bool_]) -> float | None:
    if np.ptp(values) == 0 or wrong.all() or not wrong.any():
        return None
    return float(spearmanr(values, wrong).statistic)


def _accuracy_bands(
    values: NDArray[np.float64], right: NDArray[np.float64], bands: int, groups: Groups
) -> tuple[DisagreementBand, ...]:
    edges = np.unique(np.quantile(values[~np.isnan(right)], np.linspace(0, 1, bands + 1)))
    last = max(len(edges) - 2, 0)
    places = np.minimum(np.searchsorted(edges, values, side="right") - 1, last)
    return tuple(
        DisagreementBand(
            low=float(edges[place]),
            high=float(edges[min(place + 1, len(edges) - 1)]),
            accuracy=groups.share(np.where(places == place, right, np.nan)),
        )
        for place in range(last + 1)
    )


def _risk_coverage(values: NDArray[np.float64], right: NDArray[np.bool_], points: int) -> tuple[RiskPoint, ...]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Among equal disagreement any order is as good: each such pair carries the error rate of them all.
    rates = np.bincount(place, ~right) / counts
    errors = np.cumsum(np.repeat(rates, counts))
    kept = np.unique(np.ceil(np.arange(1, points + 1) * len(values) / points).astype(int))
    return tuple(
        RiskPoint(coverage=float(count / len(values)), risk=float(errors[count - 1] / count)) for count in kept
    )
