"""Best-of-n: KL, win rate and the unbiased curve, against enumeration."""

import dataclasses
import json
import math
from itertools import combinations, product

import numpy as np
import pytest

from rlhf_ray.reward.judge.best_of_n import (
    BestOfNPoint,
    best_of_n_curve,
    expected_win_rate,
    fit_overoptimisation,
    kl_bound,
    subset_maximum_weights,
    win_rate,
)


def expected_pick(proxy: np.ndarray, gold: np.ndarray, n: int) -> tuple[float, float]:
    """Proxy and gold of the pick over every subset of n, random among equal proxy scores."""
    picks = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[list(subset)])
        picks.append((best, np.mean([gold[i] for i in subset if proxy[i] == best])))
    return tuple(np.mean(picks, axis=0))


def test_the_bound_to_its_digits():
    assert [f"{kl_bound(n):.4f}" for n in (1, 4, 16, 128)] == ["0.0000", "0.6363", "1.8351", "3.8598"]
    with pytest.raises(ValueError, match="best of 0"):
        kl_bound(0)


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0], [2.0, 0.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
def test_the_bound_holds_for_every_policy_with_repeated_outcomes_or_without(scores: list[float]):
    policy, n = np.array([0.1, 0.4, 0.3, 0.2]), 3
    picked = np.zeros(4)
    for draws in product(range(4), repeat=n):
        best = max(scores[i] for i in draws)
        tied = [i for i in draws if scores[i] == best]
        for i in tied:
            picked[i] += np.prod(policy[list(draws)]) / len(tied)
    assert -1e-12 < np.sum(picked * np.log(picked / policy)) < kl_bound(n)


def test_win_rate_without_ties_is_n_over_n_plus_one():
    scores = np.random.default_rng(0).normal(size=(5, 9))
    for n in (1, 2, 8):
        assert win_rate(scores, n) == pytest.approx(expected_win_rate(n))
    assert expected_win_rate(4) == 0.8
    with pytest.raises(ValueError, match="best of 9"):
        win_rate(scores, 9)


def test_win_rate_with_ties_against_enumeration():
    scores = np.random.default_rng(1).integers(0, 4, (3, 7)).astype(float)
    wins = []
    for row in scores:
        for other in range(7):
            for subset in combinations([i for i in range(7) if i != other], 3):
                wins.append(0.5 * (1 + np.sign(max(row[list(subset)]) - row[other])))
    assert win_rate(scores, 3) == pytest.approx(np.mean(wins))
    assert np.mean(wins) < expected_win_rate(3)


def test_weights_are_ratios_of_binomials_and_do_not_overflow():
    for samples, n in ((7, 1), (7, 3), (7, 7), (40, 11)):
        expected = [math.comb(i - 1, n - 1) / math.comb(samples, n) for i in range(1, samples + 1)]
        np.testing.assert_allclose(subset_maximum_weights(samples, n), expected, rtol=1e-12, atol=0)
    large = subset_maximum_weights(5_000, 700)
    assert np.isfinite(large).all()
    assert large.sum() == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match="best of 8 from 7"):
        subset_maximum_weights(7, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_the_curve_against_all_subsets(tied: bool):
    generator = np.random.default_rng(2)
    proxy = generator.integers(0, 4, (4, 8)).astype(float) if tied else generator.normal(size=(4, 8))
    gold = generator.normal(size=(4, 8))
    curve = best_of_n_curve(proxy, gold, [2, 5, 8])
    assert [point.n for point in curve.points] == [1, 2, 5, 8]
    for point in curve.points:
        pick = np.mean([expected_pick(*prompt, point.n) for prompt in zip(proxy, gold, strict=True)], axis=0)
        assert (point.proxy, point.gold) == pytest.approx(tuple(pick), abs=1e-12)
        assert point.gold_low < point.gold < point.gold_high
    best = max(curve.points, key=lambda point: point.gold)
    assert (curve.peak_n, curve.peak_sqrt_kl) == (best.n, math.sqrt(kl_bound(best.n)))
    json.dumps(dataclasses.asdict(curve), allow_nan=False)


def test_the_interval_is_that_of_prompts():
    generator = np.random.default_rng(3)
    # Prompts differ, samples of a prompt do not: the spread is over prompts.
    gold = np.repeat(generator.normal(size=(200, 1)), 4, axis=1)
    point = best_of_n_curve(generator.normal(size=(200, 4)), gold, [4]).points[-1]
    assert point.gold_high - point.gold_low == pytest.approx(2 * 1.96 * gold[:, 0].std() / math.sqrt(200), rel=0.1)


def test_an_exploited_proxy_has_its_peak_inside():
    generator = np.random.default_rng(4)
    proxy = generator.normal(size=(400, 128))
    gold = proxy - 0.5 * np.maximum(proxy - 0.5, 0) ** 2 * 2
    curve = best_of_n_curve(proxy, gold, [2, 4, 8, 16, 32, 64, 128])
    assert 1 < curve.peak_n < 128
    assert [point.proxy for point in curve.points] == sorted(point.proxy for point in curve.points)


@pytest.mark.parametrize("worth", [0.0, 0.3])
def test_a_fall_by_chance_is_none(worth: float):
    """Gold that does not fall with the proxy is found to fall in one run of twenty at the most, though the highest of
    six points is nearly never the last."""
    falls = last = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        proxy = generator.normal(size=(50, 32))
        gold = worth * np.tanh(proxy) + generator.normal(size=(50, 32))
        curve = best_of_n_curve(proxy, gold, [2, 4, 8, 16, 32])
        falls += curve.drop.low > 0
        last += curve.peak_n == 32
    assert falls <= 10
    assert last < 180


def test_a_fall_is_found_where_there_is_one():
    generator = np.random.default_rng(7)
    proxy = generator.normal(size=(200, 64))
    gold = proxy - 2 * np.maximum(proxy - 0.8, 0) ** 2 + generator.normal(size=(200, 64))
    curve = best_of_n_curve(proxy, gold, [2, 4, 8, 16, 32, 64])
    peak = next(point for point in curve.points if point.n == curve.peak_n)
    assert curve.drop.value == pytest.approx(peak.gold - curve.points[-1].gold)
    assert curve.drop.low > 0


def points_of(alpha: float, beta: float) -> list[BestOfNPoint]:
    points = []
    for n in (1, 2, 8, 64):
        d = math.sqrt(kl_bound(n))
        points.append(BestOfNPoint(n, kl_bound(n), d, 0.0, 0.7 + d * (alpha - beta * d), None, None))
    return points


def test_the_fit_finds_the_coefficients():
    fit = fit_overoptimisation(points_of(2.0, 0.8))
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.peak_d) == pytest.approx((2.0, 0.8, 1.25))
    straight = fit_overoptimisation(points_of(2.0, -0.1))
    assert straight is not None
    assert straight.peak_d is None
    assert fit_overoptimisation(points_of(2.0, 0.8)[:2]) is None


def test_malformed_scores_are_refused():
    good = np.zeros((2, 3))
    with pytest.raises(ValueError, match="not finite"):
        best_of_n_curve(good, np.full((2, 3), np.nan), [2])
    with pytest.raises(ValueError, match="shape"):
        best_of_n_curve(good, np.zeros((2, 4)), [2])
    with pytest.raises(ValueError, match="prompts by samples"):
        best_of_n_curve(np.zeros(3), np.zeros(3), [2])
