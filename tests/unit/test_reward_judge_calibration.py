"""Calibration: closed forms, the sampling floor, soft labels, and independence of orientation."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import norm

from rlhf_ray.reward.judge.calibration import (
    TEMPERATURE_BOUNDS,
    Calibration,
    calibration,
    fit_temperature,
    negative_log_likelihood,
)
from rlhf_ray.reward.judge.groups import Groups

SCALES = (1.0, 2.0, 0.5, 4.0)


def comparisons(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Δ ~ N(0, 2²) and labels Bernoulli(σ(Δ))."""
    generator = np.random.default_rng(seed)
    delta = generator.normal(0, 2, count)
    return delta, (generator.random(count) < expit(delta)).astype(float)


def chosen_first(delta: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(label == 1, delta, -delta), np.ones_like(label)


def calibrated(delta: np.ndarray, label: np.ndarray, **more: object) -> Calibration:
    """Of pairs that share nothing."""
    return calibration(delta, label, Groups.by(range(len(delta))), seed=0, **more)


def expected_error(scale: float) -> float:
    """E |σ(scale Δ) − σ(Δ)| for Δ ~ N(0, 2²): the calibration error of scores in another unit."""
    return quad(lambda z: 2 * norm.pdf(z, 0, 2) * abs(expit(scale * z) - expit(z)), 0, 40)[0]


def test_the_error_of_scores_in_another_unit():
    errors, temperatures = [], []
    for scale in SCALES:
        delta, label = chosen_first(*comparisons(200_000, seed=0))
        errors.append(calibrated(scale * delta, label).ece)
        temperatures.append(fit_temperature(scale * delta, label).temperature)
    assert errors[0] < 0.004
    np.testing.assert_allclose(errors[1:], [expected_error(scale) for scale in SCALES[1:]], atol=0.003)
    np.testing.assert_allclose(temperatures, SCALES, rtol=0.02)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_a_model_that_is_never_sure_is_no_calibrated_one(bins: int):
    """Whatever the number of bins: with one around one half, over [0, 1], this was 0.016."""
    delta, label = chosen_first(*comparisons(4_000, seed=0))
    found = calibrated(0.02 * delta, label, bins=bins)
    right = np.mean(delta > 0)
    assert found.ece == pytest.approx(right - expit(0.02 * np.abs(delta)).mean(), abs=1e-12)
    assert found.ece == pytest.approx(0.267, abs=0.01)
    assert found.excess.low > 0.2


def test_the_floor_is_the_error_of_calibrated_models():
    drawn = [calibrated(*chosen_first(*comparisons(2_000, seed))) for seed in range(200)]
    errors = np.array([each.ece for each in drawn])
    floors = np.array([each.floor.mean for each in drawn])
    assert errors.mean() == pytest.approx(floors.mean(), abs=0.001)
    assert floors.mean() == pytest.approx(0.021, abs=0.001)
    assert np.mean([each.ece <= each.floor.quantile_95 for each in drawn]) == pytest.approx(0.95, abs=0.03)
    assert 0.92 <= np.mean([each.excess.low <= 0 <= each.excess.high for each in drawn]) <= 0.98
    assert drawn[0] == calibrated(*chosen_first(*comparisons(2_000, 0)))


@pytest.mark.parametrize("votes", [1, 3, 16])
def test_a_perfect_model_is_calibrated_to_shares_of_votes(votes: int):
    """Against the majority of 16 votes its temperature would be 0.28."""
    temperatures, excesses, floors = [], [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        delta = generator.normal(0, 2, 1_000)
        share = generator.binomial(votes, expit(delta)) / votes
        temperatures.append(fit_temperature(delta, share).temperature)
        found = calibrated(delta, share)
        excesses.append(found.excess.value)
        floors.append(found.floor.mean)
    assert np.mean(temperatures) == pytest.approx(1, abs=0.03)
    assert np.mean(excesses) == pytest.approx(0, abs=0.003)
    assert np.mean(floors) == pytest.approx(0.030 / np.sqrt(votes), rel=0.1)


def test_the_floor_knows_of_groups():
    """Labels of a prompt are wrong together: without the groups every such model is miscalibrated."""
    excess = {True: [], False: []}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        prompts, delta = np.repeat(np.arange(30), 20), generator.normal(0, 2, 600)
        together = expit(delta + np.where(delta > 0, 1, -1) * generator.choice([-2, 2], 30)[prompts])
        label = (generator.random(600) < together).astype(float)
        temperature = fit_temperature(delta, label).temperature
        for known in excess:
            groups = Groups.by(prompts if known else range(600))
            excess[known].append(calibration(delta, label, groups, seed=0, temperature=temperature).excess)
    misled, told = (np.mean([each.low > 0 for each in excess[known]]) for known in (False, True))
    assert misled > 0.15
    assert told <= 0.05


def test_orientation_does_not_matter():
    delta, label = comparisons(5_000, seed=2)
    label[:500], delta[:3] = np.round(np.linspace(0, 1, 500), 1), 0.0
    turned = np.random.default_rng(9).random(5_000) < 0.5
    there = calibrated(delta, label, temperature=1.3)
    back = calibrated(np.where(turned, -delta, delta), np.where(turned, 1 - label, label), temperature=1.3)
    assert back.ece == pytest.approx(there.ece, abs=1e-12)
    assert back.floor.mean == pytest.approx(there.floor.mean, rel=1e-9)
    assert [each.count for each in back.bins] == [each.count for each in there.bins]
    assert back.negative_log_likelihood == pytest.approx(there.negative_log_likelihood, rel=1e-12)
    assert back.brier == pytest.approx(there.brier, rel=1e-12)


def test_the_bins_explain_the_error():
    delta, label = comparisons(3_000, seed=4)
    result = calibrated(2 * delta, label)
    total = sum(each.count * abs(each.confidence - each.frequency) for each in result.bins if each.count)
    assert total / result.count == pytest.approx(result.ece, rel=1e-12)
    assert sum(each.count for each in result.bins) == result.count == 3_000
    assert all(each.low <= each.confidence <= each.high for each in result.bins if each.count)
    by_hand = [label[i] * (1 - expit(2 * delta[i])) ** 2 + (1 - label[i]) * expit(2 * delta[i]) ** 2 for i in range(50)]
    assert calibrated(2 * delta[:50], label[:50]).brier == pytest.approx(np.mean(by_hand))


def test_a_temperature_is_a_division_of_the_scores():
    delta, label = comparisons(1_000, seed=5)
    hot, plain = calibrated(delta, label, temperature=2.0), calibrated(delta / 2, label)
    assert dataclasses.replace(hot, temperature=1.0) == plain


def test_bins_without_pairs_are_json():
    result = calibrated(np.full(200, 5.0), np.ones(200))
    assert [each.confidence is None for each in result.bins] == [True, True, True, False]
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_probability_one_falls_into_the_last_bin():
    sure = calibrated(np.array([1e3, -1e3]), np.array([1.0, 0.0]))
    assert (sure.ece, sure.bins[-1].count) == (0.0, 2)


def test_few_pairs_have_few_bins():
    delta, label = comparisons(240, seed=0)
    assert len(calibrated(delta, label).bins) == 4
    assert len(calibrated(delta[:10], label[:10]).bins) == 1


def test_the_fit_is_the_minimum():
    delta, label = comparisons(400, seed=6)
    label[:100] = np.random.default_rng(0).random(100)
    fit = fit_temperature(delta * 7, label)
    search = minimize_scalar(
        lambda log_t: negative_log_likelihood(delta * 7, label, np.exp(log_t)), bounds=(-4, 4), method="bounded"
    )
    assert fit.negative_log_likelihood == pytest.approx(search.fun, rel=1e-9)
    assert fit.temperature == pytest.approx(np.exp(search.x), rel=1e-3)
    # A single soft pair: T takes the score to the label's logit.
    assert fit_temperature([3.0], [0.8]).temperature == pytest.approx(3 / logit(0.8), rel=1e-9)


def test_no_finite_temperature_is_reported_as_such():
    lowest, highest = (bound * np.sqrt(1.75) for bound in TEMPERATURE_BOUNDS)
    separable = fit_temperature([1.0, 2.0, 0.5], [1.0, 1.0, 1.0])
    assert (separable.temperature, separable.at_bound) == (pytest.approx(lowest), True)
    inverse = fit_temperature([1.0, 2.0, 0.5], [0.0, 0.0, 0.0])
    assert (inverse.temperature, inverse.at_bound) == (pytest.approx(highest), True)
    huge = fit_temperature([1e4, -1e4], [1.0, 0.0])
    assert huge.at_bound
    assert huge.negative_log_likelihood < 1e-40
    assert fit_temperature([0.0, 0.0], [1.0, 0.5]).at_bound
    assert separable.stored == inverse.stored == huge.stored == 1.0
    assert fit_temperature([3.0], [0.8]).stored == fit_temperature([3.0], [0.8]).temperature
