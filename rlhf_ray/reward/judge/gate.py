"""The release gate: whether a policy may be trained with a reward model, and every reason why not.

A policy finds whatever a reward model gets wrong, so a doubt counts against the model, and all doubts alike. There must
be enough pairs, from enough prompts, for a sound model to show that it is one; then every estimate is held against its
limit by the end of its interval that speaks against the model. An estimate without an interval refuses, unless there
was nothing to estimate (responses that never differ in length). Leaks and failures are counted, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.config.reward_model import GateSettings
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.bias import NOTHING_TO_PAY_FOR, LengthBias
from rlhf_ray.reward.judge.evaluation import PairEvaluation
from rlhf_ray.reward.judge.groups import Estimate, Proportion
from rlhf_ray.reward.judge.leakage import Leakage

CHANCE = 0.5
LENGTH_IS_QUALITY = 0.9
"""Where raters surely prefer the longer response more often than this, too little tells length from quality."""


@dataclass(frozen=True)
class GateFigures:
    """What the gate asks of an evaluation on held-out pairs.

    Attributes:
        prompts: that the pairs come from.
        accuracy: on all pairs with a preference.
        calibration_excess: expected calibration error above its sampling floor, after temperature scaling.
        length: in score and labels.
        leaked_share: pairs with a text that was trained on, of all; None where the training texts are not known.
        failed_share: pairs with a text that has no score, of all.
    """

    prompts: int
    accuracy: Proportion
    calibration_excess: Estimate
    length: LengthBias
    leaked_share: float | None
    failed_share: float

    @classmethod
    def of(cls, evaluation: PairEvaluation, asked_pairs: int, leakage: Leakage | None) -> GateFigures:
        """From an evaluation.

        Args:
            asked_pairs: all pairs that should have been scored.
        """
        return cls(
            prompts=evaluation.prompts,
            accuracy=evaluation.accuracy,
            calibration_excess=evaluation.scaled.excess,
            length=evaluation.length,
            leaked_share=None if leakage is None else leakage.texts.share,
            failed_share=1 - evaluation.pairs / asked_pairs,
        )


@dataclass(frozen=True)
class Verdict:
    """Released, or the reasons why not, a line each."""

    released: bool
    refusals: tuple[str, ...]


def judge(figures: GateFigures, checks: Sequence[Check], settings: GateSettings) -> Verdict:
    """Every check that failed and every figure beyond its limit."""
    refusals = [f"{check.name}: {check.found}; {check.meaning}" for check in checks if check.passed is False]
    refusals += [
        *_evidence(figures, settings),
        *_accuracy(figures.accuracy, settings),
        *_calibration(figures.calibration_excess, settings),
        *_length(figures.length, settings),
        *_shares(figures, settings),
    ]
    return Verdict(not refusals, tuple(refusals))


def _evidence(figures: GateFigures, settings: GateSettings) -> Iterator[str]:
    pairs, prompts = figures.accuracy.count, figures.prompts
    if pairs < settings.min_pairs or prompts < settings.min_prompts:
        yield (
            f"evidence: {pairs} held-out pairs with a preference from {prompts} prompts, gate.min_pairs is "
            f"{settings.min_pairs} and gate.min_prompts {settings.min_prompts}; on so few a sound model cannot be told "
            "from a faulty one"
        )


def _accuracy(accuracy: Proportion, settings: GateSettings) -> Iterator[str]:
    if accuracy.high is not None and accuracy.high < CHANCE:
        yield (
            f"accuracy: {_told(accuracy)}, the whole interval below chance: the labels are flipped, in training or "
            "here; a policy would be trained to give the answers that people reject"
        )
    elif accuracy.low is None or not accuracy.low > settings.min_accuracy:
        yield (
            f"accuracy: {_told(accuracy)}, the lower end must be above gate.min_accuracy "
            f"{settings.min_accuracy:g}; a policy would be trained on a preference that may not be people's"
        )


def _calibration(excess: Estimate, settings: GateSettings) -> Iterator[str]:
    if excess.high is None or not excess.high <= settings.max_calibration_excess:
        yield (
            f"calibration: the expected calibration error, after temperature scaling, is above its sampling floor by "
            f"{_told(excess)}, the upper end must not be above gate.max_calibration_excess "
            f"{settings.max_calibration_excess:g}; score differences may be no preference probabilities, so the size "
            "of a reward means little to a policy"
        )


def _length(length: LengthBias, settings: GateSettings) -> Iterator[str]:
    longer, paid, share = length.longer_preferred, length.overpayment, length.overpayment.share
    if longer.low is not None and longer.low > LENGTH_IS_QUALITY:
        yield (
            f"length: people prefer the longer response in {_told(longer)}; nothing here tells length from quality, "
            "and a policy would learn to write more"
        )
    elif paid == NOTHING_TO_PAY_FOR:
        return
    elif share.high is None:
        yield (
            f"length: between responses of the same length a typical score difference is worth {_told(paid.score)} "
            "in log-odds, the lower end must be above 0; the model may take length for quality, and a policy would "
            "learn to write more"
        )
    elif not share.high <= settings.max_overpaid_length:
        yield (
            f"length: {_told(share)} of a typical score difference is paid for length beyond what people prefer it "
            f"for, the upper end must not be above gate.max_overpaid_length {settings.max_overpaid_length:g}; a policy "
            "would be paid for longer answers, better or not"
        )


def _shares(figures: GateFigures, settings: GateSettings) -> Iterator[str]:
    leaked = figures.leaked_share
    if leaked is not None and not leaked <= settings.max_leaked_share:
        yield (
            f"leakage: {leaked:.1%} of the pairs hold a text that was trained on, gate.max_leaked_share is "
            f"{settings.max_leaked_share:.1%}; what was learnt by heart passes for accuracy, a policy meets new texts"
        )
    if math.isnan(figures.failed_share) or figures.failed_share > settings.max_failed_share:
        yield (
            f"failures: {figures.failed_share:.1%} of the pairs hold a text without a score, gate.max_failed_share is "
            f"{settings.max_failed_share:.1%}; a policy would learn nothing from such responses, or to produce them"
        )


def _told(estimate: Estimate) -> str:
    parts = (estimate.value, estimate.low, estimate.high)
    value, low, high = ("?" if part is None else f"{part:.3f}" for part in parts)
    count = f" on {estimate.count} pairs" if isinstance(estimate, Proportion) else ""
    return f"{value} [{low}, {high}]{count}"
