"""Biases: what moves the score besides the preference, and what in the labels may have taught it.

A longer response is often a better one, so that score and length go together proves nothing. Nor does it where people
prefer the same response: among such pairs the better one is better by more or by less, and a perfect score, which
says so, still goes with length. What counts is the other way round: **given the score**, does length tell what people
prefer? If they like the longer one *less* than the score says, the score pays for length. That they like it *more* is
no fault: any score misses a part of what makes responses better, and longer, and so does not pay for it. The same is
asked of formatting, given score and length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from rlhf_ray.reward.judge.accuracy import check_pairs, pair_credit
from rlhf_ray.reward.judge.groups import UNKNOWN, Estimate, Groups, Proportion

PRIOR_STD = 5.0
"""Of the coefficients, in log-odds for a typical difference: wider than any data on preferences."""


@dataclass(frozen=True)
class Overpayment:
    """What the score pays for a feature of the text beyond what people prefer it for.

    Attributes:
        score: log-odds of being preferred for a typical difference (root mean square) of scores between responses
            with the same features. An interval that holds 0: it says nothing that the features do not say.
        share: of a typical difference of scores, what a typical difference of the feature is paid too much, which a
            policy can exploit; negative: too little. `UNKNOWN` where the interval of `score` holds 0.
        coefficient: the same as score for each unit of the feature: `score − coefficient · feature` pays as people do.
    """

    score: Estimate
    share: Estimate
    coefficient: float | None

    @property
    def penalty(self) -> float:
        """What to subtract for each unit of the feature: the coefficient where more than chance is overpaid, else 0."""
        return self.coefficient or 0.0 if self.share.low is not None and self.share.low > 0 else 0.0


NOTHING_TO_PAY_FOR = Overpayment(UNKNOWN, UNKNOWN, None)
"""Where score or feature do not vary."""


@dataclass(frozen=True)
class LengthBias:
    """Length in the score and in the labels.

    Attributes:
        overpayment: for length.
        accuracy_longer_preferred: accuracy on pairs whose preferred response is the longer one.
        accuracy_shorter_preferred: accuracy where it is the shorter one; a model that only counts words has 0 here.
        longer_preferred: share of the labels that prefer the longer response, ties and equal lengths left out.
        mean_length_difference: mean of preferred − other, over pairs without a tie; None where all are ties.
    """

    overpayment: Overpayment
    accuracy_longer_preferred: Proportion
    accuracy_shorter_preferred: Proportion
    longer_preferred: Proportion
    mean_length_difference: float | None


@dataclass(frozen=True)
class FormatArtefact:
    """One feature of the formatting.

    Attributes:
        name: of the feature, see `FORMAT_FEATURES`.
        pairs_that_differ: pairs in which the two responses have different values of it.
        more_preferred: share of these whose preferred response has more of it, ties in the label left out.
        overpayment: for the feature, given length.
    """

    name: str
    pairs_that_differ: int
    more_preferred: Proportion
    overpayment: Overpayment


def _matches(pattern: str) -> Callable[[str], float]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: float(sum(1 for _ in compiled.finditer(text)))


def _upper_case_share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum(map(str.isupper, letters)) / len(letters) if letters else 0.0


FORMAT_FEATURES: Mapping[str, Callable[[str], float]] = {
    "list items": _matches(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S"),
    "headings": _matches(r"^#{1,6}[ \t]+\S"),
    "bold": _matches(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*"),
    "code blocks": _matches(r"^[ \t]*```[^`]*?^[ \t]*```"),
    "exclamation marks": _matches("!"),
    "question marks": _matches(r"\?"),
    "digits": _matches(r"\d"),
    "newlines": _matches(r"\n"),
    "upper-case share": _upper_case_share,
}
"""Counts in a response by name, Markdown as CommonMark has it; the last is the share of its letters."""


def overpayment(
    score_differences: ArrayLike,
    feature_differences: ArrayLike,
    chosen_probability: ArrayLike,
    groups: Groups,
    *,
    given: Sequence[ArrayLike] = (),
) -> Overpayment:
    """Logistic regression of the preference on differences of score and feature, without intercept.

    With P(chosen) = σ(a Δs + b Δf + …), a score that is quality plus c for each unit of the feature has b = −a c: what
    it overpays is −b/a, as a share of a typical score difference −(b/a) · rms(Δf) / rms(Δs). Soft labels are taken as
    they are. The coefficients have a normal prior (`PRIOR_STD`), so that they stay finite, with wide intervals, where
    scores separate the labels, or where score and feature are the same thing. Variances are those of the estimating
    equations (Huber 1967), summed over related pairs; the share's is from those of a and b by the delta method.

    Args:
        score_differences, feature_differences: `[P]` chosen − rejected. Orientation does not matter.
        chosen_probability: `[P]` in [0, 1].
        groups: of the pairs.
        given: `[P]` each, differences of other features that are held fixed.
    """
    delta, probability = check_pairs(score_differences, chosen_probability)
    columns = np.stack([delta, *(check_pairs(each, probability)[0] for each in (feature_differences, *given))], axis=1)
    scale = np.sqrt(np.square(columns).mean(axis=0)) if len(columns) else np.zeros(columns.shape[1])
    if not scale[:2].all():
        return NOTHING_TO_PAY_FOR
    columns = columns[:, scale > 0] / scale[scale > 0]
    coefficients, influence, prior = _logistic(columns, probability)

    def estimate(value: float, direction: NDArray[np.float64]) -> Estimate:
        return groups.interval(value, influence @ direction, more_variance=float(direction @ prior @ direction))

    unit = np.eye(len(coefficients))
    a, b = coefficients[:2].tolist()
    score = estimate(a, unit[0])
    if score.low is None or score.low <= 0:
        return Overpayment(score, UNKNOWN, None)
    return Overpayment(score, estimate(-b / a, (b / a * unit[0] - unit[1]) / a), -b / a * float(scale[0] / scale[1]))


def length_bias(
    lengths: NDArray[np.int64], differences: ArrayLike, chosen_probability: ArrayLike, groups: Groups
) -> LengthBias:
    """Length bias of a reward model, beside that of the labels.

    Args:
        lengths: `[P, 2]` of the chosen and the rejected response, in the unit in which the coefficient is wanted.
        differences: `[P]` score of chosen − score of rejected.
        chosen_probability: `[P]` in [0, 1].
        groups: of the pairs.
    """
    delta, probability = check_pairs(differences, chosen_probability)
    longer = (lengths[:, 0] - lengths[:, 1]).astype(np.float64)
    credit = pair_credit(delta, probability)
    preferred_longer = longer * np.sign(probability - 0.5)
    decided = probability != 0.5
    paid = overpayment(delta, longer, probability, groups)
    # People, and models, may ask which response is longer and not by how much.
    score = overpayment(delta, longer, probability, groups, given=[np.sign(longer)]).score
    beyond_length = score.low is not None and score.low > 0
    return LengthBias(
        overpayment=replace(paid, score=score) if beyond_length else Overpayment(score, UNKNOWN, None),
        accuracy_longer_preferred=groups.share(np.where(preferred_longer > 0, credit, np.nan)),
        accuracy_shorter_preferred=groups.share(np.where(preferred_longer < 0, credit, np.nan)),
        longer_preferred=_more_preferred(preferred_longer, groups),
        mean_length_difference=float(preferred_longer[decided].mean()) if decided.any() else None,
    )


def format_artefacts(
    chosen_texts: Sequence[str],
    rejected_texts: Sequence[str],
    lengths: NDArray[np.int64],
    differences: ArrayLike,
    chosen_probability: ArrayLike,
    groups: Groups,
) -> tuple[FormatArtefact, ...]:
    """What the score overpays each feature of `FORMAT_FEATURES`, given length, and how the labels take it.

    Args:
        chosen_texts, rejected_texts: `[P]` responses.
        lengths: `[P, 2]` of both.
        differences: `[P]` score of chosen − score of rejected.
        chosen_probability: `[P]` in [0, 1].
        groups: of the pairs.
    """
    delta, probability = check_pairs(differences, chosen_probability)
    longer = lengths[:, 0] - lengths[:, 1]
    artefacts = []
    for name, feature in FORMAT_FEATURES.items():
        difference = np.array([feature(text) for text in chosen_texts]) - [feature(text) for text in rejected_texts]
        artefacts.append(
            FormatArtefact(
                name=name,
                pairs_that_differ=int((difference != 0).sum()),
                more_preferred=_more_preferred(difference * np.sign(probability - 0.5), groups),
                overpayment=overpayment(delta, difference, probability, groups, given=[longer]),
            )
        )
    return tuple(artefacts)


def position(chosen_is_first: Sequence[bool | None], groups: Groups) -> Proportion:
    """Share of pairs whose preferred response was shown first, over those where that is known.

    One half is what raters without a preference for a place would give.
    """
    return groups.share([np.nan if first is None else float(first) for first in chosen_is_first])


def _more_preferred(preferred_more: NDArray[np.float64], groups: Groups) -> Proportion:
    """How often the preferred response has more of something, where they differ in it and there is a preference."""
    return groups.share(np.where(preferred_more != 0, preferred_more > 0, np.nan))


def _logistic(
    columns: NDArray[np.float64], probability: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients `[K]` of `[P, K]` columns, the influence of each pair `[P, K]`, and the prior's covariance `[K, K]`.

    The maximum of the posterior; its Newton step for each pair's own residual is the pair's influence.
    """
    precision = np.eye(columns.shape[1]) / PRIOR_STD**2

    def loss(beta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = columns @ beta
        likelihood = probability * log_expit(logits) + (1 - probability) * log_expit(-logits)
        return float(beta @ precision @ beta / 2 - likelihood.sum()), precision @ beta + columns.T @ (
            expit(logits) - probability
        )

    def curvature(beta: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = expit(columns @ beta)
        return columns.T @ (columns * (predicted * (1 - predicted))[:, None]) + precision

    beta = minimize(loss, np.zeros(columns.shape[1]), jac=True, hess=curvature, method="trust-exact").x
    inverse = np.linalg.inv(curvature(beta))
    return beta, (columns * (probability - expit(columns @ beta))[:, None]) @ inverse, inverse @ precision @ inverse
