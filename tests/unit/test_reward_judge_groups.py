"""Intervals over pairs that share prompts and texts: against brute force, and by how often they cover the truth."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest
from scipy.stats import t as student

from rlhf_ray.reward.judge.groups import Groups, mean_with_interval
from tests.synthetic import preference_pair

REPETITIONS = 400
CLAIMED = (0.92, 0.98)


def test_covariance_is_the_sum_over_related_pairs():
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, 8, 60)
    texts = np.array([generator.permutation(25)[:2] for _ in range(60)])
    texts[:4], prompts[:2] = (3, 4), 1  # the same two texts under one prompt and under others
    influence = generator.normal(size=(60, 2))
    expected = sum(
        np.outer(influence[i], influence[j])
        for i in range(60)
        for j in range(60)
        if prompts[i] == prompts[j] or set(texts[i]) & set(texts[j])
    )
    np.testing.assert_allclose(Groups(prompts, texts).covariance(influence), expected, atol=1e-12)


def test_pairs_are_related_by_prompt_and_by_whole_text():
    rows = [("a", "x", "y"), ("a", "z", "w"), ("b", "x", "y"), ("", "ax", "v"), ("  ", "p", "q"), ("", "r", "s")]
    pairs = [preference_pair(prompt, chosen, rejected) for prompt, chosen, rejected in rows]
    groups = Groups.of(pairs)
    assert groups.count == 5, "a row without a prompt is a group of its own"
    related = [
        [bool(groups.covariance(np.eye(6)[:, [i, j]]).any(where=~np.eye(2, dtype=bool))) for j in range(6)]
        for i in range(6)
    ]
    # The two of prompt a, and "ax" as prompt and response and as a whole text.
    assert {(i, j) for i in range(6) for j in range(i) if related[i][j]} == {(1, 0), (3, 0)}


def test_rows_without_prompts_are_as_good_as_rows_of_different_prompts():
    texts = [(f"good {index}", f"bad {index}") for index in range(50)]
    without = Groups.of([preference_pair("", *both) for both in texts])
    with_prompts = Groups.of([preference_pair(f"p{index}", *both) for index, both in enumerate(texts)])
    one_prompt = Groups.of([preference_pair("p", *both) for both in texts])
    credit = (np.arange(50) % 4 > 0).astype(float)
    assert without.share(credit) == with_prompts.share(credit) == one_prompt.share(credit)
    assert without.share(credit).low is not None


@pytest.mark.parametrize("twice", [False, True])
def test_the_interval_is_that_of_independent_values(twice: bool):
    credit = np.repeat([1.0, 0.0], [900, 100])
    groups = Groups.by(range(1000))
    if twice:  # every pair a second time is no further evidence
        credit, groups = np.tile(credit, 2), Groups.by([*range(1000), *range(1000)])
    share = groups.share(credit)
    wilson = binomtest(900, 1000).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((wilson.low, wilson.high), abs=3e-4)


def test_a_mean_has_students_interval():
    values = np.random.default_rng(0).normal(size=12)
    found = mean_with_interval(values)
    assert (found.low, found.high) == pytest.approx(
        student.interval(0.95, 11, values.mean(), values.std(ddof=1) / np.sqrt(12))
    )


@pytest.mark.parametrize("right", [0, 12])
def test_all_right_or_all_wrong_is_no_certainty(right: int):
    share = Groups.by(range(12)).share([1.0 if right else 0.0] * 12)
    exact = binomtest(right, 12).proportion_ci(method="exact")
    assert (share.low, share.high) == pytest.approx((exact.low, exact.high), abs=0.04)
    five_each = Groups.by(np.arange(60) // 5).share([1.0 if right else 0.0] * 60)
    assert (five_each.low, five_each.high) == (share.low, share.high)


def test_nothing_to_count_is_none():
    nothing = Groups.by("ab").share([np.nan, np.nan])
    assert (nothing.value, nothing.low, nothing.high, nothing.count) == (None, None, None, 0)
    one_group = Groups.by("aa").share([1.0, 0.0])
    assert (one_group.value, one_group.low, one_group.high) == (0.5, None, None)
    assert mean_with_interval(np.ones(1)).low is None


@pytest.mark.parametrize(
    ("num_groups", "pairs", "spread", "unequal"),
    [(10, 20, 0.0, False), (10, 20, 1.0, False), (10, 20, 2.0, False), (10, 20, 1.0, True), (40, 5, 1.0, True)],
)
def test_grouped_intervals_cover_the_truth_as_often_as_they_say(
    num_groups: int, pairs: int, spread: float, unequal: bool
):
    """A percentile bootstrap over groups covers 85 % here."""
    generator = np.random.default_rng(0)
    truth = expit(1.4 + spread * generator.normal(size=400_000)).mean()
    covered = 0
    for _ in range(REPETITIONS):
        sizes = 1 + generator.geometric(1 / pairs, num_groups) if unequal else np.full(num_groups, pairs)
        names = np.repeat(np.arange(num_groups), sizes)
        rate = expit(1.4 + spread * generator.normal(size=num_groups))
        share = Groups.by(names).share((generator.random(len(names)) < rate[names]).astype(float))
        covered += share.low <= truth <= share.high
    assert CLAIMED[0] <= covered / REPETITIONS <= CLAIMED[1]


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_intervals_over_pairs_that_share_texts_cover_the_truth(error: float):
    """Scores are wrong about texts, and a text is in six pairs: by pairs alone 87 % cover."""
    generator = np.random.default_rng(1)

    def drawn(num_texts: int) -> tuple[np.ndarray, np.ndarray]:
        quality, wrong = generator.normal(size=num_texts), error * generator.normal(size=num_texts)
        first = np.repeat(np.arange(num_texts), 3)
        second = (first + 1 + generator.integers(0, num_texts - 1, len(first))) % num_texts
        true = quality[first] - quality[second]
        label = generator.random(len(first)) < expit(2 * true)
        return ((true + wrong[first] - wrong[second] > 0) == label).astype(float), np.stack([first, second], axis=1)

    truth = np.mean([drawn(60)[0].mean() for _ in range(4000)])
    covered = ignored = 0
    for _ in range(REPETITIONS):
        credit, texts = drawn(60)
        for known in (True, False):
            groups = Groups.by(range(len(credit)))
            share = (replace(groups, texts=texts) if known else groups).share(credit)
            if known:
                covered += share.low <= truth <= share.high
            else:
                ignored += share.low <= truth <= share.high
    assert CLAIMED[0] <= covered / REPETITIONS <= CLAIMED[1]
    assert error == 0 or ignored / REPETITIONS < CLAIMED[0]
