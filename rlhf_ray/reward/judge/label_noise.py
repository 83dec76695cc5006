"""The accuracy that the labels allow: no model agrees with raters more than raters agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import beta

from rlhf_ray.data.preferences import PreferencePair, Votes


@dataclass(frozen=True)
class RaterCeiling:
    """What agreement between raters implies; both are None without any soft label.

    Attributes:
        accuracy: the best that any model can reach against the vote of one rater, drawn at random.
        agreement: probability that two different raters, drawn at random, vote for the same response, where a tie is
            half a vote for either.
        soft_pairs: pairs whose label is neither 0 nor 1.
        pairs: that the figures are over, see `shows_agreement`.
    """

    accuracy: float | None
    agreement: float | None
    soft_pairs: int
    pairs: int


def rater_ceiling(pairs: Sequence[PreferencePair]) -> RaterCeiling:
    """The ceiling mean max(p, 1 − p), and the agreement mean p² + (1 − p)², where p is what all people would say.

    Of n votes the share p̂ is known, and max(p̂, 1 − p̂) is too large: three tosses of a coin give 0.75 where 0.5 is
    right. But whether two *different* raters agree, over all pairs of the n, estimates p² + (1 − p)² without bias. With
    d = p − ½ that is ½ + 2 E d², and the ceiling is ½ + E |d|, which lies between ½ + 2 E d² and ½ + √(E d²). Within
    these bounds it is taken where p has the Beta(a, a) distribution of that E d² = 1 / (4 (2a + 1)):
    E |d| = 1 / (2 a B(½, a)) (for logistic-normal p, with a standard deviation from 0.5 to 4, 0.003 too low or less).

    A tie counts half for either response. A label without votes is taken for p itself.

    Args:
        pairs: those that say nothing of it (`shows_agreement`) have no part in it.
    """
    used = [pair for pair, shows in zip(pairs, shows_agreement(pairs), strict=True) if shows]
    soft = sum(0 < pair.chosen_probability < 1 for pair in used)
    if not soft:
        return RaterCeiling(None, None, 0, len(used))
    known = np.array([pair.chosen_probability - 0.5 for pair in used if pair.votes is None])
    squares = np.array([_squared_lean(pair.votes) for pair in used if pair.votes is not None])
    leans, square = float(np.abs(known).sum()), float(squares.mean()) if len(squares) else 0.0
    if square >= 0.25:
        leans += 0.5 * len(squares)
    elif square > 0:
        a = (1 / (4 * square) - 1) / 2
        leans += len(squares) / (2 * a * float(beta(0.5, a)))
    agreement = 0.5 + 2 * float(np.square(known).sum() + squares.sum()) / len(used)
    return RaterCeiling(0.5 + leans / len(used), min(max(agreement, 0.0), 1.0), soft, len(used))


def shows_agreement(pairs: Sequence[PreferencePair]) -> NDArray[np.bool_]:
    """`[P]`: whether a pair's label says how far raters agree: all but those with a single vote. Beside rows with
    votes, a hard label without any is one, too: somebody's choice, and not the choice of everybody."""
    some_votes = any(pair.votes is not None for pair in pairs)
    return np.array(
        [
            pair.raters > 1 if pair.raters is not None else not some_votes or 0 < pair.chosen_probability < 1
            for pair in pairs
        ],
        dtype=bool,
    )


def _squared_lean(votes: Votes) -> float:
    """An unbiased estimate of (p − ½)²: the mean product of two different raters' ½ (chosen), −½ or 0 (tie)."""
    total, squares = (votes.chosen - votes.rejected) / 2, (votes.chosen + votes.rejected) / 4
    raters = votes.chosen + votes.rejected + votes.tie
    return (total**2 - squares) / (raters * (raters - 1))


def single_vote_accuracy(differences: ArrayLike, chosen_probability: ArrayLike) -> float | None:
    """How often the model agrees with the vote of one rater, to be held against the ceiling, which is for such votes.

    Mean of p where the chosen response has the higher score, 1 − p where it has the lower one, a half where they are
    equal. None where no label is soft.

    Args:
        differences: `[P]` score of chosen − score of rejected.
        chosen_probability: `[P]` share of the raters' votes for the chosen one.
    """
    delta, probability = np.asarray(differences, dtype=np.float64), np.asarray(chosen_probability, dtype=np.float64)
    if not ((probability > 0) & (probability < 1)).any():
        return None
    return float((0.5 + (probability - 0.5) * np.sign(delta)).mean())
