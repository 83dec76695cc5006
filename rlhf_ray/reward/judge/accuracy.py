"""Pair accuracy with an interval that says how far to trust it.

A pair is `difference`, the score of the chosen response minus that of the rejected one, and `chosen_probability`, how
likely a person is to prefer the chosen one: 1 for a hard label, one half for a tie, below one half where people prefer
the rejected one after all. Nothing here depends on which response of a pair is called the chosen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.reward.judge.groups import Groups, Proportion


@dataclass(frozen=True)
class StratumAccuracy:
    """Accuracy on the pairs of one source, attribute or range of gaps."""

    name: str
    accuracy: Proportion


@dataclass(frozen=True)
class GapBins:
    """Ranges of the gap between mean ratings.

    Attributes:
        names: of the ranges, from small to large, such as `[0.5, 1)`.
        labels: one a pair, a name, or None where the pair has no gap or lies outside all ranges.
    """

    names: tuple[str, ...]
    labels: tuple[str | None, ...]


def check_pairs(differences: ArrayLike, chosen_probability: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """Both as float64 `[P]`.

    Raises:
        ValueError: other shapes, a difference that is not finite, or a probability outside [0, 1].
    """
    delta = np.asarray(differences, dtype=np.float64)
    probability = np.asarray(chosen_probability, dtype=np.float64)
    if delta.ndim != 1 or delta.shape != probability.shape:
        raise ValueError(f"differences and chosen_probability have shapes {delta.shape} and {probability.shape}, not P")
    if not np.isfinite(delta).all():
        raise ValueError("a score difference is not finite")
    # Written so that NaN fails as well.
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("a chosen_probability is outside [0, 1]")
    return delta, probability


def pair_credit(differences: ArrayLike, chosen_probability: ArrayLike) -> NDArray[np.float64]:
    """`[P]`: 1 where the preferred response has the higher score, 0.5 for equal scores, 0 otherwise.

    NaN for a tie in the label, where there is no preferred response.
    """
    delta, probability = check_pairs(differences, chosen_probability)
    credit = 0.5 * (1 + np.sign(delta) * np.sign(probability - 0.5))
    return np.where(probability == 0.5, np.nan, credit)


def accuracy_by(
    labels: Sequence[str | None],
    credit: NDArray[np.float64],
    groups: Groups,
    names: Sequence[str] | None = None,
) -> tuple[StratumAccuracy, ...]:
    """Share of right pairs in every stratum.

    Args:
        labels: `[P]` name of the pair's stratum; None: in no stratum.
        credit: `[P]`, see `pair_credit`.
        names: the strata to report, in this order; None: all there are, sorted.
    """
    if len(labels) != len(credit):
        raise ValueError(f"{len(labels)} labels for {len(credit)} pairs")
    stratum = np.array(labels, dtype=object)
    if names is None:
        names = sorted({label for label in labels if label is not None})
    return tuple(StratumAccuracy(name, groups.share(np.where(stratum == name, credit, np.nan))) for name in names)


def gap_bins(gaps: Sequence[float | None], *, bins: int = 4, edges: Sequence[float] | None = None) -> GapBins:
    """Sort pairs by how far apart people rated the two responses.

    Args:
        gaps: `[P]` difference of mean ratings, or None; the sign is that of the labels' orientation and is ignored.
        bins: ranges with about as many pairs each; fewer where gaps repeat.
        edges: ascending, in place of `bins`: ranges `[edge, next edge)`, the last one with both its ends.
    """
    sizes = np.array([np.nan if gap is None else abs(gap) for gap in gaps], dtype=np.float64)
    known = sizes[~np.isnan(sizes)]
    if not len(known):
        return GapBins((), (None,) * len(gaps))
    bounds = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)) if edges is None else np.asarray(edges, float))
    # As few digits as tell the ranges apart: their names are what pairs are sorted by.
    digits = next(digits for digits in range(3, 18) if len({f"{bound:.{digits}g}" for bound in bounds}) == len(bounds))
    if len(bounds) == 1:
        bounds = np.repeat(bounds, 2)
    last = len(bounds) - 2
    names = tuple(
        f"[{low:.{digits}g}, {high:.{digits}g}{']' if place == last else ')'}"
        for place, (low, high) in enumerate(pairwise(bounds))
    )
    places = np.minimum(np.searchsorted(bounds, sizes, side="right") - 1, last)
    inside = (sizes >= bounds[0]) & (sizes <= bounds[-1])
    return GapBins(names, tuple(names[place] if ok else None for place, ok in zip(places, inside, strict=True)))
