"""Ceilings that label noise sets."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from rlhf_ray.data.preferences import PreferencePair, Votes
from rlhf_ray.reward.judge.label_noise import (
    bayes_accuracy,
    noisy_probability,
    rater_ceiling,
    single_vote_accuracy,
)
from tests.synthetic import preference_pair

FLIPS = (0.0, 0.1, 0.25)


def test_the_table_of_flips():
    delta = np.random.default_rng(0).normal(0, 2, 200_000)
    bayes = [bayes_accuracy(expit(delta), flip) for flip in FLIPS]
    clean = quad(lambda z: norm.pdf(z, 0, 2) * max(expit(z), expit(-z)), -40, 40, points=[0])[0]
    closed = [0.5 + (clean - 0.5) * (1 - 2 * flip) for flip in FLIPS]
    assert [f"{value:.4f}" for value in closed] == ["0.7780", "0.7224", "0.6390"]
    np.testing.assert_allclose(bayes, closed, atol=5e-4)
    # The published figures are of a sample of 200,000 labels, which scatters by 0.0011.
    np.testing.assert_allclose(closed, [0.778, 0.722, 0.640], atol=0.0011)


@pytest.mark.parametrize("flip", FLIPS)
def test_the_ceiling_is_reached_by_the_true_model_on_drawn_labels(flip: float):
    generator = np.random.default_rng(1)
    delta = generator.normal(0, 2, 200_000)
    clean = generator.random(200_000) < expit(delta)
    noisy = clean ^ (generator.random(200_000) < flip)
    assert np.mean((delta > 0) == noisy) == pytest.approx(bayes_accuracy(expit(delta), flip), abs=0.003)
    assert np.mean((delta > 0) == clean) == pytest.approx(0.778, abs=0.003)
    assert noisy.mean() == pytest.approx(noisy_probability(expit(delta), flip).mean(), abs=0.004)


def test_a_flip_rate_is_a_probability():
    with pytest.raises(ValueError, match="flip rate"):
        noisy_probability([0.5], 1.5)


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
        truth.append(bayes_accuracy(probability))
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
    both = rater_ceiling([*soft, *voted((2, 1, 0), (2, 1, 0), (3, 0, 0))])
    assert ceiling.accuracy > both.accuracy > 0.5


def test_hard_labels_imply_no_ceiling():
    ceiling = rater_ceiling([preference_pair("p", "a", "b", label) for label in (1.0, 0.0, 1.0)])
    assert (ceiling.accuracy, ceiling.agreement, ceiling.soft_pairs, ceiling.pairs) == (None, None, 0, 3)


def test_agreement_with_single_votes():
    probability = np.array([0.9, 0.2, 0.5, 1.0])
    perfect = single_vote_accuracy([2.0, -1.0, 0.3, 1.0], probability)
    assert perfect == pytest.approx((0.9 + 0.8 + 0.5 + 1) / 4)
    assert single_vote_accuracy([-2.0, 1.0, 0.3, 0.0], probability) == pytest.approx((0.1 + 0.2 + 0.5 + 0.5) / 4)
    assert single_vote_accuracy([1.0, 2.0], [1.0, 0.0]) is None
