"""Disagreement of an ensemble against its errors."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from rlhf_ray.reward.judge.disagreement import DisagreementReport, auroc, disagreement_against_error
from rlhf_ray.reward.judge.groups import Groups


def compared(values: np.ndarray, correct: np.ndarray, **more: int) -> DisagreementReport:
    """Of pairs that share nothing."""
    return disagreement_against_error(values, np.asarray(correct, float), Groups.by(range(len(values))), **more)


def test_auroc_against_all_pairs_of_pairs():
    generator = np.random.default_rng(0)
    values, correct = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.7
    wrong, right = values[~correct], values[correct]
    brute = np.mean([[0.5 * (1 + np.sign(a - b)) for b in right] for a in wrong])
    report = compared(values, correct)
    assert report.auroc.value == pytest.approx(brute)
    assert report.spearman == pytest.approx(spearmanr(values, ~correct).statistic)
    assert (report.pairs, report.errors) == (60, len(wrong))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_has_the_spread_of_repeated_samples(grouped: bool):
    """Also where disagreement is that of the prompt, shared by ten pairs."""
    generator = np.random.default_rng(1)
    areas, reaches = [], []
    for _ in range(400):
        prompts = np.arange(200) // 10 if grouped else np.arange(200)
        wrong = generator.random(200) < 0.3
        values = generator.normal(size=200)[prompts] + 0.8 * wrong
        found = auroc(values, wrong, ~wrong, Groups.by(prompts))
        areas.append(found.value)
        reaches.append((found.high - found.low) / (2 * (2.09 if grouped else 1.97)))
    assert np.mean(reaches) == pytest.approx(np.std(areas), rel=0.1)


@pytest.mark.parametrize("errors", [2, 3, 5, 20])
def test_few_errors_leave_much_open(errors: int):
    """Where disagreement tells nothing, the interval holds one half in 19 of 20 cases."""
    generator = np.random.default_rng(errors)
    wrong = np.arange(200) < errors
    found = [auroc(generator.normal(size=200), wrong, ~wrong, Groups.by(range(200))) for _ in range(400)]
    assert np.mean([each.low <= 0.5 <= each.high for each in found]) >= 0.92


def test_one_error_leaves_all_open():
    report = compared(np.array([0.9, 0.1, 0.2]), np.array([False, True, True]))
    assert (report.auroc.value, report.auroc.low, report.auroc.high) == (1.0, None, None)


def test_perfect_and_useless_disagreement():
    correct = np.repeat([True, False], [80, 20])
    knows = compared(np.where(correct, 0.1, 0.9) + np.arange(100) / 1000, correct)
    assert knows.auroc.value == knows.auroc.high == 1.0
    assert 0.7 < knows.auroc.low < 1.0, "twenty errors do not prove that there will be no other"
    assert [band.accuracy.value for band in knows.bands] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert [(point.coverage, point.risk) for point in knows.risk_coverage][7:] == [
        (0.8, 0.0),
        (0.9, pytest.approx(1 / 9)),
        (1.0, pytest.approx(0.2)),
    ]
    constant = compared(np.zeros(100), correct)
    assert (constant.auroc.value, constant.spearman) == (0.5, None)
    assert [point.risk for point in constant.risk_coverage] == pytest.approx([0.2] * 10)
    assert [band.accuracy.count for band in constant.bands] == [100]


def test_risk_among_ties_is_that_of_a_random_order():
    values, correct = np.array([2.0, 1.0, 1.0, 3.0]), np.array([True, False, True, False])
    risks = [point.risk for point in compared(values, correct, points=4).risk_coverage]
    assert risks == pytest.approx([0.5, 0.5, 1 / 3, 0.5])


def test_bands_hold_every_pair_once():
    generator = np.random.default_rng(2)
    report = compared(generator.random(503), generator.random(503) < 0.8)
    assert len(report.bands) == 5
    assert sum(band.accuracy.count for band in report.bands) == 503
    assert all(100 <= band.accuracy.count <= 101 for band in report.bands)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


@pytest.mark.parametrize("correct", [True, False])
def test_without_both_outcomes_there_is_nothing_to_tell(correct: bool):
    report = compared([0.1, 0.2, 0.3], [correct] * 3)
    assert (report.auroc.value, report.auroc.low, report.spearman) == (None, None, None)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_ties_in_the_label_are_left_out():
    values, credit = np.array([0.1, 0.9, 0.5, 0.3, 0.7]), np.array([1.0, 0.0, np.nan, 1.0, 0.5])
    found = disagreement_against_error(values, credit, Groups.by(range(5)))
    kept = ~np.isnan(credit)
    assert found == compared(values[kept], credit[kept] == 1)
    assert (found.pairs, found.errors) == (4, 2)


def test_impossible_input_is_refused():
    with pytest.raises(ValueError, match="shapes"):
        compared(np.array([0.1]), np.array([True, False]))
    with pytest.raises(ValueError, match="not finite"):
        compared(np.array([np.inf]), np.array([True]))
