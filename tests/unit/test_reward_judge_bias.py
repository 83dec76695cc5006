"""Length, format and position biases."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from rlhf_ray.reward.judge.bias import (
    FORMAT_FEATURES,
    NOTHING_TO_PAY_FOR,
    format_artefacts,
    length_bias,
    overpayment,
    position,
)
from rlhf_ray.reward.judge.groups import Groups


def alone(count: int) -> Groups:
    return Groups.by(range(count))


def compared(seed: int, count: int = 1_000, goes_with: float = 0.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences in quality (log-odds) and in length that go together, and votes."""
    generator = np.random.default_rng(seed)
    longer = generator.normal(size=count)
    quality = 2 * (goes_with * longer + np.sqrt(1 - goes_with**2) * generator.normal(size=count))
    return quality, 30 * longer, (generator.random(count) < expit(quality)).astype(float)


def test_the_share_is_that_of_the_logistic_regression():
    quality, longer, label = compared(0, 400)
    label[:100] = np.random.default_rng(1).random(100)
    score = quality + 0.02 * longer

    def loss(beta: np.ndarray) -> float:
        logits = beta[0] * score + beta[1] * longer
        return -np.sum(label * log_expit(logits) + (1 - label) * log_expit(-logits))

    a, b = minimize(loss, [0.5, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    found = overpayment(score, longer, label, alone(400))
    sizes = [np.sqrt(np.mean(values**2)) for values in (score, longer)]
    assert found.score.value == pytest.approx(a * sizes[0], rel=5e-3)
    assert found.coefficient == pytest.approx(-b / a, rel=5e-3)
    assert found.share.value == pytest.approx(-b / a * sizes[1] / sizes[0], rel=5e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_intervals_of_what_is_overpaid_cover_the_truth(share: float):
    """Perfect scores (share 0), though they go with length, and scores that pay for length on top."""
    found = []
    for seed in range(200):
        quality, longer, label = compared(seed, 500)
        unit = 2 / 30 * share
        score = quality + unit * longer
        truth = unit * np.sqrt(np.mean(longer**2) / np.mean(score**2))
        estimate = overpayment(score, longer, label, alone(500)).share
        found.append((estimate.value - truth, estimate.low <= truth <= estimate.high))
    deviation, covered = np.mean(found, axis=0)
    assert abs(deviation) < 0.02
    assert 0.92 <= covered <= 0.98


def test_a_perfect_score_pays_for_nothing_where_the_old_question_accuses_it():
    quality, longer, label = compared(0, 20_000)
    sign = 2 * label - 1
    assert np.corrcoef(sign * quality, sign * longer)[0, 1] > 0.25, "given the preference, score and length correlate"
    found = overpayment(quality, longer, label, alone(20_000))
    assert abs(found.share.value) < 0.03
    assert found.penalty == 0


def test_the_penalty_takes_out_what_is_overpaid_and_no_more():
    quality, longer, label = compared(3, 4_000)
    score = quality + 0.04 * longer
    before = overpayment(score, longer, label, alone(4_000))
    assert before.penalty == before.coefficient == pytest.approx(0.04, abs=0.01)
    after = overpayment(score - before.penalty * longer, longer, label, alone(4_000))
    assert after.share.value == pytest.approx(0, abs=0.01)
    underpaid = overpayment(quality - 0.04 * longer, longer, label, alone(4_000))
    assert underpaid.share.high < 0
    assert underpaid.penalty == 0, "no reward for length"


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_score_that_counts_words_says_nothing_else(noise: float):
    _, longer, label = compared(4)
    score = longer + noise * np.random.default_rng(0).normal(size=1_000)
    found = overpayment(score, longer, label, alone(1_000))
    assert found.score.low < 0 < found.score.high
    assert found.share.value is None
    assert found.penalty == 0


def test_scores_that_separate_the_labels_have_finite_estimates():
    quality, longer, _ = compared(5)
    found = overpayment(quality, longer, (quality > 0).astype(float), alone(1_000))
    assert found.score.low > 0
    assert -0.1 < found.share.low < found.share.high < 0.1


def test_no_variation_is_nothing_to_pay_for():
    assert overpayment([1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], alone(3)) == NOTHING_TO_PAY_FOR
    assert overpayment([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], alone(3)) == NOTHING_TO_PAY_FOR
    assert overpayment([], [], [], alone(0)) == NOTHING_TO_PAY_FOR


def test_accuracy_where_the_longer_and_where_the_shorter_one_is_preferred():
    lengths = np.array([[5, 2], [9, 4], [3, 7], [8, 8], [4, 1], [6, 2]])
    label = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.5])
    bias = length_bias(lengths, lengths[:, 0] - lengths[:, 1], label, alone(6))
    assert (bias.accuracy_longer_preferred.value, bias.accuracy_longer_preferred.count) == (1.0, 2)
    assert (bias.accuracy_shorter_preferred.value, bias.accuracy_shorter_preferred.count) == (0.0, 2)
    assert (bias.longer_preferred.value, bias.longer_preferred.count) == (0.5, 4)
    assert bias.mean_length_difference == pytest.approx((3 + 5 - 4 + 0 - 3) / 5)
    json.dumps(dataclasses.asdict(bias), allow_nan=False)


def test_length_bias_is_blind_to_orientation():
    generator = np.random.default_rng(5)
    lengths, delta, label = generator.integers(1, 50, (90, 2)), generator.normal(size=90), generator.random(90)
    there = length_bias(lengths, delta, label, alone(90))
    back = length_bias(lengths[:, ::-1], -delta, 1 - label, alone(90))
    assert back.accuracy_shorter_preferred == there.accuracy_shorter_preferred
    assert back.longer_preferred == there.longer_preferred
    assert back.overpayment.score.value == pytest.approx(there.overpayment.score.value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("list items", "- one\n* two\n  3. three\n4) four\n-five\n2026 was\n**bold**", 4),
        ("headings", "# one\n### two\n#three\ntext # four", 2),
        ("bold", "**one** and **two**, 2 ** 3 ** 4\n***", 2),
        ("code blocks", "```python\na = 1\n```\ntext\n```\nb\n```\n```open", 2),
        ("exclamation marks", "a! b!!", 3),
        ("question marks", "a? b", 1),
        ("digits", "10 of 7", 3),
        ("newlines", "a\n\nb", 2),
        ("upper-case share", "AB cd 12", 0.5),
        ("upper-case share", "12 !", 0.0),
    ],
)
def test_format_features(name: str, text: str, count: float):
    assert FORMAT_FEATURES[name](text) == count


def test_a_model_that_likes_lists_is_found_out_though_lists_are_long():
    generator = np.random.default_rng(6)
    count = 1_500
    items, words = generator.integers(0, 5, (2, count)), generator.integers(5, 40, (2, count))
    texts = [
        ["word " * n + "\n- item" * m for n, m in zip(*both, strict=True)] for both in zip(words, items, strict=True)
    ]
    lengths = (words + 2 * items).T
    quality = generator.normal(0, 2, count)
    label = (generator.random(count) < expit(quality)).astype(float)
    score = quality + 0.5 * (items[0] - items[1])
    found = {each.name: each for each in format_artefacts(*texts, lengths, score, label, alone(count))}
    assert set(found) == set(FORMAT_FEATURES)
    lists = found["list items"]
    assert lists.pairs_that_differ == int((items[0] != items[1]).sum()) == lists.more_preferred.count
    assert lists.overpayment.coefficient == pytest.approx(0.5, abs=0.1)
    assert lists.overpayment.share.low > 0.2
    assert found["headings"].pairs_that_differ == 0
    assert found["headings"].overpayment == NOTHING_TO_PAY_FOR
    json.dumps([dataclasses.asdict(artefact) for artefact in found.values()], allow_nan=False)


def test_position_counts_what_is_known_and_allows_for_groups():
    share = position([True, None, True, False, True], alone(5))
    assert (share.value, share.count) == (0.75, 4)
    assert position([None], alone(1)).value is None
    shown = [True, True, False, True] * 50
    grouped, single = position(shown, Groups.by(np.arange(200) // 20)), position(shown, alone(200))
    assert grouped.value == single.value
    whole = position(np.repeat([True, True, False, True], 50).tolist(), Groups.by(np.arange(200) // 10))
    assert whole.high - whole.low > 2 * (single.high - single.low)
