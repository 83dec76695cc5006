"""Pair accuracy and its strata."""

import numpy as np
import pytest

from rlhf_ray.reward.judge.accuracy import accuracy_by, gap_bins, pair_credit
from rlhf_ray.reward.judge.groups import Groups


def test_credit_counts_equal_scores_half_and_leaves_ties_out():
    credit = pair_credit([1.0, -1.0, 0.0, 1.0, -2.0, 3.0], [1.0, 1.0, 0.9, 0.2, 0.0, 0.5])
    np.testing.assert_array_equal(credit, [1.0, 0.0, 0.5, 0.0, 1.0, np.nan])


def test_the_orientation_of_pairs_does_not_matter():
    generator = np.random.default_rng(3)
    delta, label = generator.normal(size=300), generator.random(300).round(1)
    turned = generator.random(300) < 0.5
    np.testing.assert_array_equal(
        pair_credit(delta, label), pair_credit(np.where(turned, -delta, delta), np.where(turned, 1 - label, label))
    )


@pytest.mark.parametrize(
    ("delta", "label", "message"),
    [
        ([np.nan], [1.0], "not finite"),
        ([1.0], [np.nan], "outside"),
        ([1.0], [1.1], "outside"),
        ([1.0, 2.0], [1.0], "shapes"),
    ],
)
def test_impossible_input_is_refused(delta: list[float], label: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        pair_credit(delta, label)


def test_strata_are_the_accuracies_of_their_pairs():
    credit = pair_credit(np.random.default_rng(2).normal(1, 2, 60), np.ones(60))
    names = ["web", "books", None] * 20
    groups = np.arange(60) // 6
    strata = accuracy_by(names, credit, Groups.by(groups))
    assert [stratum.name for stratum in strata] == ["books", "web"]
    assert strata[0].accuracy == Groups.by(groups[1::3]).share(credit[1::3])
    assert accuracy_by(names, credit, Groups.by(groups), ["web", "none"])[1].accuracy.count == 0


def test_gap_bins_hold_every_gap_once():
    gaps = [0.1, -0.2, 0.3, 0.4, None, 0.5, 0.6, 0.7, 0.8]
    binned = gap_bins(gaps, bins=4)
    assert len(binned.names) == 4
    assert [binned.labels.count(name) for name in binned.names] == [2, 2, 2, 2]
    assert binned.labels[4] is None
    assert binned.labels[0] == binned.labels[1] == binned.names[0]
    fixed = gap_bins([0.5, 1.0, 2.0, 3.0], edges=(0.5, 1.0, 2.0))
    assert fixed.names == ("[0.5, 1)", "[1, 2]")
    assert fixed.labels == ("[0.5, 1)", "[1, 2]", "[1, 2]", None)
    assert gap_bins([1.0, 1.0], bins=4).labels == ("[1, 1]", "[1, 1]")
    close = gap_bins([1234.1, 1234.2, 1234.3, 1234.4, 1234.6, 1234.8], bins=3)
    assert [close.labels.count(name) for name in close.names] == [2, 2, 2], close.names
    assert gap_bins([None]).names == ()
