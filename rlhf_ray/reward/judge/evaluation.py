"""What is known of a reward model after its pairs were scored: one report, from arrays, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward_model import PREFERENCE, JudgementSettings
from rlhf_ray.data.preferences import PreferencePair
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.judge.accuracy import StratumAccuracy, accuracy_by, gap_bins, pair_credit
from rlhf_ray.reward.judge.bias import FormatArtefact, LengthBias, format_artefacts, length_bias, position
from rlhf_ray.reward.judge.calibration import Calibration, TemperatureFit, calibration, fit_temperature
from rlhf_ray.reward.judge.disagreement import DisagreementReport, disagreement_against_error
from rlhf_ray.reward.judge.groups import Groups, Proportion
from rlhf_ray.reward.judge.inputs import attribute_label
from rlhf_ray.reward.judge.label_noise import RaterCeiling, rater_ceiling, shows_agreement, single_vote_accuracy

_HISTOGRAM_BINS = 40


@dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of P pairs; those without a score are left out before.

    Attributes:
        chosen, rejected: `[P]` scores.
        chosen_attributes, rejected_attributes: `[P, A]`, each attribute averaged over the members.
        member_differences: `[P, K]` chosen − rejected as each member has it.
        num_tokens: `[P, 2]`.
    """

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_attributes: NDArray[np.float64]
    rejected_attributes: NDArray[np.float64]
    member_differences: NDArray[np.float64]
    num_tokens: NDArray[np.int64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """`[P]` chosen − rejected."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Histogram:
    """Counts between edges (one more than counts)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Histogram:
        counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()), float(values.mean()), float(values.std()))


@dataclass(frozen=True)
class AttributeAccuracy:
    """How well the head of an attribute agrees with that attribute's labels."""

    name: str
    accuracy: Proportion


@dataclass(frozen=True)
class PairEvaluation:
    """How well a reward model's preferences are those of people.

    Attributes:
        prompts: different ones, of pairs with a preference; a pair without one counts as one.
        accuracy: against the majority's preference. Intervals everywhere allow for prompts and texts that pairs share.
        calibration: of σ(Δ) as it is, against the shares of people.
        scaled: of σ(Δ/T), each half of the pairs with the temperature fitted on the other half.
        temperature: fitted on all pairs.
        vote_accuracy: agreement with the vote of a single rater; None without soft labels.
        ceiling: of that agreement, by what the raters agree among themselves.
        scores, margins: of all texts; of preferred − other.
        position: share of pairs whose preferred response was shown first; None where the rows do not say.
        disagreement: None for a single judge.
        max_tokens: of the longest text.
    """

    pairs: int
    prompts: int
    ties: int
    accuracy: Proportion
    by_source: tuple[StratumAccuracy, ...]
    by_gap: tuple[StratumAccuracy, ...]
    by_attribute: tuple[AttributeAccuracy, ...]
    calibration: Calibration
    scaled: Calibration
    temperature: TemperatureFit
    vote_accuracy: float | None
    ceiling: RaterCeiling
    scores: Histogram
    margins: Histogram
    length: LengthBias
    formats: tuple[FormatArtefact, ...]
    position: Proportion | None
    disagreement: DisagreementReport | None
    max_tokens: int


def evaluate_pairs(
    pairs: Sequence[PreferencePair],
    scores: PairScores,
    attributes: Sequence[str],
    settings: JudgementSettings,
    seed: int,
) -> PairEvaluation:
    """Judge scores of pairs.

    Args:
        pairs: as many as there are scores, in the same order.
        attributes: of the heads, the preference first.
        seed: keys folds and sampling floor.
    """
    delta = scores.differences
    probability = np.array([pair.chosen_probability for pair in pairs])
    groups = Groups.of(pairs)
    preferred = np.sign(probability - 0.5)
    credit = pair_credit(delta, probability)
    bins = gap_bins([pair.gap for pair in pairs], bins=settings.gap_bins)
    texts = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    first = [pair.chosen_is_first if sign else None for pair, sign in zip(pairs, preferred, strict=True)]
    voted = shows_agreement(pairs)  # as in the ceiling, with which it is compared
    several_members = scores.member_differences.shape[1] > 1 and bool(preferred.any())
    return PairEvaluation(
        pairs=len(pairs),
        prompts=_num_prompts([pair for pair, sign in zip(pairs, preferred, strict=True) if sign]),
        ties=int((preferred == 0).sum()),
        accuracy=groups.share(credit),
        by_source=accuracy_by([pair.source for pair in pairs], credit, groups),
        by_gap=accuracy_by(bins.labels, credit, groups, bins.names),
        by_attribute=tuple(
            _attribute_accuracy(name, index, pairs, scores, groups) for index, name in enumerate(attributes)
        ),
        calibration=calibration(delta, probability, groups, seed=seed, bins=settings.bins),
        scaled=calibration(
            _cross_fitted(delta, probability, groups, seed), probability, groups, seed=seed, bins=settings.bins
        ),
        temperature=fit_temperature(delta, probability),
        vote_accuracy=single_vote_accuracy(delta[voted], probability[voted]),
        ceiling=rater_ceiling(pairs),
        scores=Histogram.of(np.concatenate([scores.chosen, scores.rejected])),
        margins=Histogram.of(np.where(preferred < 0, -delta, delta)),
        length=length_bias(scores.num_tokens, delta, probability, groups),
        formats=format_artefacts(*texts, scores.num_tokens, delta, probability, groups),
        position=position(first, groups) if any(known is not None for known in first) else None,
        disagreement=disagreement_against_error(scores.member_differences.std(axis=1), credit, groups)
        if several_members
        else None,
        max_tokens=int(scores.num_tokens.max()),
    )


def _num_prompts(pairs: Sequence[PreferencePair]) -> int:
    return len({pair.prompt if pair.prompt.strip() else place for place, pair in enumerate(pairs)})


def _attribute_accuracy(
    name: str, index: int, pairs: Sequence[PreferencePair], scores: PairScores, groups: Groups
) -> AttributeAccuracy:
    own = scores.chosen_attributes[:, index] - scores.rejected_attributes[:, index]
    labels = [pair.chosen_probability if name == PREFERENCE else attribute_label(pair, name) for pair in pairs]
    # A pair without the attribute is left out as a tie is.
    known = np.array([0.5 if label is None else label for label in labels])
    return AttributeAccuracy(name, groups.share(pair_credit(own, known)))


def _cross_fitted(
    delta: NDArray[np.float64], probability: NDArray[np.float64], groups: Groups, seed: int
) -> NDArray[np.float64]:
    """Differences over a temperature that the labels of their own prompts had no part in."""
    halves = keyed_generator(seed, "temperature-folds").permutation(int(groups.prompts.max()) + 1) % 2
    fold = halves[groups.prompts]
    scaled = delta.copy()
    for half in (0, 1):
        own, other = fold == half, fold != half
        if other.any():
            # At a bound, too: where the other half is all right, its pairs say that the model is always sure.
            scaled[own] = delta[own] / fit_temperature(delta[other], probability[other]).temperature
    return scaled
