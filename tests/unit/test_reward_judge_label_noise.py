"""Ceilings that label noise sets."""

import numpy as np
import pytest
from scipy.special import expit

from rlhf_ray.data.preferences import PreferencePair, Votes
from rlhf_ray.reward.judge.label_noise import rater_ceiling, single_vote_accuracy
from tests.synthetic import preference_pair


def voted(*counts: tuple[int, int, int]) -> list[PreferencePair]:
    """Pairs with so many votes for the chosen response, the rejected one, and neither."""
    return [preference_pair("p", "a", "b", (a + tie / 2) / (a + b + tie), Votes(a, b, tie)) for a, b, tie in counts]


def test_agreement_is_between_different_raters():
    pairs = voted((3, 0, 0), (2, 1, 0), (2, 2, 0), (1, 1, 2))
    answers = [[1] * 3, [1, 1, 0], [1, 1, 0, 0], [1, 0, 0.5, 0.5]]
    # Half the credit where one of the two says neither.
    same = [
        np.mean([a * b + (1 - a) * (1 - b) for place, a in enumerate(each) for b in each[:place]]) for each in answers
    ]
    ceiling = rater_ceiling(pairs)
    assert ceiling.agreement == pytest.approx(np.mean(same))
    assert (ceiling.soft_pairs, ceiling.pairs) == (3, 4)


@pytest.mark.parametrize("votes", [2, 3, 5, 16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_ceiling_is_the_accuracy_of_the_model_that_knows_everything(votes: int, spread: float):
    """However few the votes: the majority of three coins is right in three tosses of four, and nobody knows it."""
    found, truth = [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        probability = expit(spread * generator.normal(size=1_000))
        counts = generator.binomial(votes, probability)
        rows = [(max(count, votes - count), min(count, votes - count), 0) for count in counts.tolist()]
        found.append(rater_ceiling(voted(*rows)).accuracy)
        truth.append(np.maximum(probability, 1 - probability).mean())
    # Around coin flips the estimate is the root of a noisy agreement, which cannot be below 0.
    assert np.mean(found) == pytest.approx(np.mean(truth), abs=0.04 if spread == 0 else 0.01)


def test_single_votes_have_no_part_in_the_ceiling():
    several, single = voted((3, 1, 0), (2, 2, 0)), voted((1, 0, 0), (0, 0, 1))
    assert rater_ceiling(several + single) == rater_ceiling(several)
    assert rater_ceiling(single).accuracy is None


def test_labels_without_votes_are_taken_as_they_are():
    soft = [preference_pair("p", "a", "b", probability) for probability in (0.9, 0.2, 1.0)]
    ceiling = rater_ceiling(soft)
    assert ceiling.agreement == pytest.approx(np.mean([0.82, 0.68, 1.0]))
    assert ceiling.accuracy == pytest.approx(np.mean([0.9, 0.8, 1.0]))
    with_votes = voted((2, 1, 0), (2, 1, 0), (3, 0, 0))
    both = rater_ceiling([*soft, *with_votes])
    assert ceiling.accuracy > both.accuracy > 0.5
    assert both == rater_ceiling([*soft[:2], *with_votes]), "beside votes, a hard label is one person's choice"


def test_hard_labels_imply_no_ceiling():
    ceiling = rater_ceiling([preference_pair("p", "a", "b", label) for label in (1.0, 0.0, 1.0)])
    assert (ceiling.accuracy, ceiling.agreement, ceiling.soft_pairs, ceiling.pairs) == (None, None, 0, 3)


def test_agreement_with_single_votes():
    probability = np.array([0.9, 0.2, 0.5, 1.0])
    perfect = single_vote_accuracy([2.0, -1.0, 0.3, 1.0], probability)
    assert perfect == pytest.approx((0.9 + 0.8 + 0.5 + 1) / 4)
    assert single_vote_accuracy([-2.0, 1.0, 0.3, 0.0], probability) == pytest.approx((0.1 + 0.2 + 0.5 + 0.5) / 4)
    assert single_vote_accuracy([1.0, 2.0], [1.0, 0.0]) is None
