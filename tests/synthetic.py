"""Comparisons and reward models of which everything is known: what a judgement of them should say is no opinion.

A prompt has four responses, each pair of which is compared. A response has a quality; its length and its exclamation
marks go with quality, as they do in life. Raters prefer a to b with probability σ(quality of a − quality of b).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rlhf_ray.config.reward_model import GateSettings, JudgementSettings
from rlhf_ray.data.preferences import PreferencePair, Votes
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.judge.evaluation import PairEvaluation, PairScores, evaluate_pairs
from rlhf_ray.reward.judge.gate import GateFigures, Verdict, judge
from rlhf_ray.reward.judge.leakage import TrainingTexts, hash_pairs

Array = NDArray[np.float64]

RESPONSES = 4
PAIRS_PER_PROMPT = RESPONSES * (RESPONSES - 1) // 2
_FIRST, _SECOND = np.array(list(combinations(range(RESPONSES), 2))).T


def preference_pair(
    prompt: str, chosen: str, rejected: str, probability: float = 1.0, votes: Votes | None = None
) -> PreferencePair:
    """A pair with nothing but texts and a label."""
    return PreferencePair(
        prompt, chosen, rejected, probability, None, 1.0, None, {}, None, votes, None, False, f"made: {chosen[:20]}"
    )


@dataclass(frozen=True, eq=False)
class Responses:
    """`[N, 4]` responses to N prompts.

    Attributes:
        quality: log-odds of preference are its differences.
        lengths: in tokens.
        marks: exclamation marks.
        votes: of each comparison.
    """

    quality: Array
    lengths: NDArray[np.int64]
    marks: NDArray[np.int64]
    votes: int
    seed: int

    @classmethod
    def draw(cls, seed: int, prompts: int, *, spread: float = 2.0, goes_with: float = 0.4, votes: int = 1) -> Responses:
        """From a seed.

        Args:
            spread: standard deviation of differences in quality.
            goes_with: correlation of quality with length and with exclamation marks.
        """
        random = keyed_generator(seed, "responses")
        quality = random.normal(size=(prompts, RESPONSES))

        def going_along() -> Array:
            return goes_with * quality + np.sqrt(1 - goes_with**2) * random.normal(size=quality.shape)

        lengths = np.maximum(np.rint(100 + 25 * going_along()), 1).astype(np.int64)
        marks = np.maximum(np.rint(5 + 2 * going_along()), 0).astype(np.int64)
        return cls(quality * spread / np.sqrt(2), lengths, marks, votes, seed)

    def pairs(self) -> tuple[list[PreferencePair], NDArray[np.bool_]]:
        """All comparisons, and whether the response that was asked for first is the chosen one."""
        odds = expit(self.quality[:, _FIRST] - self.quality[:, _SECOND])
        counts = keyed_generator(self.seed, "votes").binomial(self.votes, odds)
        first_chosen = 2 * counts >= self.votes
        pairs = []
        for prompt, row in enumerate(counts.tolist()):
            for a, b, count in zip(_FIRST, _SECOND, row, strict=True):
                if 2 * count < self.votes:
                    a, b, count = b, a, self.votes - count
                better, worse = (f" {prompt}.{each}" + "!" * int(self.marks[prompt, each]) for each in (a, b))
                votes = Votes(count, self.votes - count, 0)
                pairs.append(preference_pair(f"prompt {prompt}", better, worse, count / self.votes, votes))
        return pairs, first_chosen.ravel()


Model = Callable[[Responses], Array]
"""A reward model: scores `[N, 4]`."""


def perfect(responses: Responses) -> Array:
    """What raters go by."""
    return responses.quality


def in_units_of(unit: float) -> Model:
    """The same in another unit: perfect after temperature scaling only."""
    return lambda responses: responses.quality / unit


unsure = in_units_of(50)


def partly_blind(responses: Responses) -> Array:
    """Sees all but a part of the quality that goes with nothing, and knows how much that is."""
    blur = keyed_generator(responses.seed, "blur").normal(0, float(responses.quality.std()), responses.quality.shape)
    return 0.5 * (responses.quality + blur)


def flipped(responses: Responses) -> Array:
    """Trained on flipped labels."""
    return -responses.quality


def length_only(responses: Responses) -> Array:
    """Counts tokens."""
    return 0.05 * responses.lengths.astype(np.float64)


def paying_for(feature: str, share: float) -> Model:
    """Quality, and beside it `share` of a typical score difference for `lengths` or `marks` (were they unrelated)."""

    def model(responses: Responses) -> Array:
        values = getattr(responses, feature)
        unit = responses.quality.std() / values.std() * share / np.sqrt(1 - share**2)
        scores: Array = responses.quality + unit * values
        return scores

    return model


def uneven(factor: float) -> Model:
    """Differences are too large for one half of the prompts and too small for the other: no temperature helps."""

    def model(responses: Responses) -> Array:
        return responses.quality * np.where(np.arange(len(responses.quality)) % 2, factor, 1 / factor)[:, None]

    return model


@dataclass(frozen=True)
class Judged:
    """What was found."""

    evaluation: PairEvaluation
    verdict: Verdict


def judged(responses: Responses, model: Model, leaked: float = 0.0) -> Judged:
    """Evaluation and verdict with the settings that users have by default.

    Args:
        leaked: share of the pairs that training had.
    """
    pairs, first_chosen = responses.pairs()
    places = np.where(first_chosen[:, None], [0, 1], [1, 0])
    sides, lengths = (
        np.take_along_axis(values[:, np.stack([_FIRST, _SECOND])].transpose(0, 2, 1).reshape(-1, 2), places, axis=1)
        for values in (model(responses), responses.lengths.astype(np.float64))
    )
    scores = PairScores(
        chosen=sides[:, 0],
        rejected=sides[:, 1],
        chosen_attributes=sides[:, :1],
        rejected_attributes=sides[:, 1:],
        member_differences=sides[:, :1] - sides[:, 1:],
        num_tokens=lengths.astype(np.int64),
    )
    evaluation = evaluate_pairs(pairs, scores, ("preference",), JudgementSettings(), seed=responses.seed)
    training = TrainingTexts.of(
        hash_pairs([preference_pair("", "other", "text"), *pairs[: round(leaked * len(pairs))]])
    )
    leakage = training.leakage(hash_pairs(pairs))
    return Judged(evaluation, judge(GateFigures.of(evaluation, len(pairs), leakage), (), GateSettings()))
