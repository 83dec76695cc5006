"""Best-of-n: how much a judge improves what it selects, and where it begins to select its own mistakes.

The reward model (the proxy) picks the best of n samples, and a second judge (gold) says what the pick is worth. With n
the proxy's score always rises; gold rises, then falls once the proxy is selected for its errors. The n and the √KL at
the top are the optimisation pressure that the reward model bears, the same currency in which PPO's KL is counted
(Gao et al. 2023, "Scaling laws for reward model overoptimization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.reward.judge.groups import LEVEL, Estimate, mean_with_interval


@dataclass(frozen=True)
class BestOfNPoint:
    """The pick of the proxy among n samples, averaged over prompts.

    Attributes:
        kl: upper bound of KL(best-of-n ‖ policy), in nats.
        sqrt_kl: its root, Gao et al.'s d.
        proxy: mean score of the pick.
        gold: mean worth of the pick.
        gold_low, gold_high: interval over prompts.
    """

    n: int
    kl: float
    sqrt_kl: float
    proxy: float
    gold: float
    gold_low: float | None
    gold_high: float | None


@dataclass(frozen=True)
class BestOfNCurve:
    """Points by ascending n, the first at n = 1, and where gold is highest.

    Attributes:
        drop: mean over prompts of gold at the peak − gold at the largest n. The peak was looked for, and is where
            chance helped: its interval holds for whichever of the points is compared with the last (Bonferroni).
    """

    points: tuple[BestOfNPoint, ...]
    peak_n: int
    peak_sqrt_kl: float
    drop: Estimate


@dataclass(frozen=True)
class OverOptimisation:
    """R(d) = d (α − β d), the gold gained over the policy at d = √KL.

    Attributes:
        peak_d: where the fit is highest, α / 2β; None where it has no maximum at d > 0.
    """

    alpha: float
    beta: float
    peak_d: float | None


def kl_bound(n: int) -> float:
    """KL(best-of-n ‖ policy) ≤ log n − (n − 1)/n, in nats.

    Equal where samples never share a score (Stiennon et al. 2020); a bound in general (Beirami et al. 2024).
    """
    if n < 1:
        raise ValueError(f"best of {n}")
    return math.log(n) - (n - 1) / n


def expected_win_rate(n: int) -> float:
    """P(the best of n beats one fresh sample) = n/(n + 1), under the scorer that picked it, where scores never tie."""
    if n < 1:
        raise ValueError(f"best of {n}")
    return n / (n + 1)


def win_rate(scores: ArrayLike, n: int) -> float:
    """Mean over prompts of P(the best of n beats another sample of the prompt), equal scores counting half.

    Exact over all choices of n samples and one other. It falls below n/(n + 1) where the scorer gives equal scores.

    Args:
        scores: `[P, N]`, N > n.
    """
    table = _score_table(scores, "scores")
    samples = table.shape[1]
    if not 1 <= n < samples:
        raise ValueError(f"best of {n} against another sample needs more than {samples} samples")
    others = np.arange(samples)
    # P(n draws among the other N − 1 samples all fall among m of them) = C(m, n) / C(N − 1, n).
    among = np.array([math.comb(m, n) / math.comb(samples - 1, n) for m in others])
    rates = []
    for row in np.sort(table, axis=1):
        below = np.searchsorted(row, row, side="left")
        at_most = np.searchsorted(row, row, side="right") - 1
        rates.append(1 - 0.5 * (among[below] + among[at_most]).mean())
    return float(np.mean(rates))


def subset_maximum_weights(samples: int, n: int) -> NDArray[np.float64]:
    """`[N]`: probability that the i-th lowest of N samples is the highest of n drawn without replacement.

    C(i − 1, n − 1) / C(N, n) for i = 1 … N, by the ratio of neighbours from the top, n/N, downwards, which neither
    overflows nor cancels.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} from {samples} samples")
    rank = np.arange(samples, 1, -1)
    descending = np.concatenate([[n / samples], np.maximum(rank - n, 0) / (rank - 1)])
    return np.cumprod(descending)[::-1]


def best_of_n_curve(
    proxy_scores: ArrayLike,
    gold_scores: ArrayLike,
    ns: Sequence[int],
) -> BestOfNCurve:
    """Proxy and gold of the proxy's pick, the average over all subsets of n of a prompt's N samples.

    That is the unbiased estimator of least variance; picking among the first n would use n of the N. Among equal proxy
    scores the pick is random.

    Args:
        proxy_scores: `[P, N]`, of N samples for each of P prompts.
        gold_scores: `[P, N]`, of the same samples.
        ns: from 1 to N; n = 1, the policy itself, is always added.
    """
    proxy, gold = _score_table(proxy_scores, "proxy_scores"), _score_table(gold_scores, "gold_scores")
    if proxy.shape != gold.shape:
        raise ValueError(f"proxy scores of shape {proxy.shape}, gold scores of shape {gold.shape}")
    sizes = sorted({1, *ns})
    weights = np.stack([subset_maximum_weights(proxy.shape[1], n) for n in sizes], axis=1)
    order = np.argsort(proxy, axis=1, kind="stable")
    proxy_sorted, gold_sorted = np.take_along_axis(proxy, order, axis=1), np.take_along_axis(gold, order, axis=1)
    gold_expected = np.stack(
        [_mean_of_tied(scores, worth) for scores, worth in zip(proxy_sorted, gold_sorted, strict=True)]
    )
    gold_picked = gold_expected @ weights
    points = []
    for column, n in enumerate(sizes):
        kl, gold_mean = kl_bound(n), mean_with_interval(gold_picked[:, column])
        points.append(
            BestOfNPoint(
                n=n,
                kl=kl,
                sqrt_kl=math.sqrt(kl),
                proxy=float((proxy_sorted @ weights[:, column]).mean()),
                gold=float(gold_picked[:, column].mean()),
                gold_low=gold_mean.low,
                gold_high=gold_mean.high,
            )
        )
    peak = max(range(len(points)), key=lambda column: points[column].gold)
    level = 1 - (1 - LEVEL) / max(len(points) - 1, 1)
    drop = mean_with_interval(gold_picked[:, peak] - gold_picked[:, -1], level)
    return BestOfNCurve(tuple(points), points[peak].n, points[peak].sqrt_kl, drop)


def fit_overoptimisation(points: Sequence[BestOfNPoint]) -> OverOptimisation | None:
    """Least-squares fit of gold − gold at n = 1 by d (α − β d) (Gao et al. 2023, their form for best-of-n).

    Returns:
        None with fewer than two points beyond n = 1.
    """
    start = [point.gold for point in points if point.n == 1]
    beyond = [point for point in points if point.n > 1]
    if not start or len(beyond) < 2:
        return None
    distance = np.array([point.sqrt_kl for point in beyond])
    gained = np.array([point.gold - start[0] for point in beyond])
    alpha, beta = np.linalg.lstsq(np.stack([distance, -(distance**2)], axis=1), gained, rcond=None)[0]
    return OverOptimisation(float(alpha), float(beta), float(alpha / (2 * beta)) if alpha > 0 and beta > 0 else None)


def _score_table(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"{name} has the shape {table.shape}, not prompts by samples")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} holds a value that is not finite")
    return table


def _mean_of_tied(ordered: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` with those of equal entries of `ordered` replaced by their mean."""
    _, place, counts = np.unique(ordered, return_inverse=True, return_counts=True)
    return (np.bincount(place, values) / counts)[place]
