"""The release gate: whether a policy may be trained with a reward model, and every reason why not.

A policy finds whatever a reward model gets wrong, so a doubt counts against the model, and all doubts alike. There must
be enough pairs, from enough prompts, for a sound model to show that it is one; then every estimate is held against its
limit by the end of its interval that speaks against the model. An estimate without an interval refuses, unless there
was nothing to estimate (responses that hardly ever differ in length). Leaks and failures are counted, not estimated.

Where the gate is not asked, or has let a figure pass, the same figure may still be worth a finding: then by what is
more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.config.reward_model import GateSettings
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.bias import NOTHING_TO_PAY_FOR, LengthBias
from rlhf_ray.reward.judge.evaluation import PairEvaluation
from rlhf_ray.reward.judge.findings import Finding, Severity, by_severity, counted, interval_text, percent, surely
from rlhf_ray.reward.judge.groups import Estimate, Proportion
from rlhf_ray.reward.judge.leakage import Leakage

CHANCE = 0.5
LENGTH_IS_QUALITY = 0.9
"""Where raters surely prefer the longer response more often than this, too little tells length from quality."""
FEW_PAIRS = 30  # Fewer pairs of a kind have an interval that says nothing about the kind.
CALIBRATION_EXCESS = 0.02  # Two points of probability above the floor: visible in the reliability diagram.
OVERPAYMENT = 0.2  # 4 % of the scores' variance; optimisation needs less than a sampler to find it.
HIGH_OVERPAYMENT = 0.4  # 16 %, where the release gate stands by default.


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

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Verdict:
        """Released where no finding is a refusal."""
        refusals = tuple(finding.line for finding in findings if finding.severity == "refusal")
        return cls(not refusals, refusals)


def judge(figures: GateFigures, checks: Sequence[Check], settings: GateSettings) -> Verdict:
    """Every check that failed and every figure beyond its limit."""
    return Verdict.of(by_severity(gate_findings(figures, checks, settings)))


def gate_findings(figures: GateFigures, checks: Sequence[Check], gate: GateSettings | None) -> Iterator[Finding]:
    """What the gate refuses, and what is worth changing in the figures that it looks at.

    Args:
        gate: None where it is not asked; nothing is a refusal then.
    """
    for check in checks:
        if check.passed is False:
            yield Finding(check.name, _sentence(check.found), _sentence(check.meaning), "", "refusal")
    if gate is not None:
        yield from _evidence(figures, gate)
    yield from _accuracy(figures.accuracy, gate)
    yield from _calibration(figures.calibration_excess, gate)
    yield from _length(figures.length, gate)
    yield from _leaks(figures.leaked_share, gate)
    yield from _failures(figures.failed_share, gate)


def _evidence(figures: GateFigures, gate: GateSettings) -> Iterator[Finding]:
    pairs, prompts = figures.accuracy.count, figures.prompts
    if pairs < gate.min_pairs or prompts < gate.min_prompts:
        yield Finding(
            "evidence",
            f"There are {pairs:,} held-out pairs with a preference from {prompts:,} prompts; gate.min_pairs is "
            f"{gate.min_pairs} and gate.min_prompts {gate.min_prompts}.",
            "On so few a sound model cannot be told from a faulty one.",
            "More held-out pairs, from more prompts.",
            "refusal",
        )


def _accuracy(accuracy: Proportion, gate: GateSettings | None) -> Iterator[Finding]:
    told = f"Accuracy is {counted(accuracy)}"
    severity: Severity = "high" if gate is None else "refusal"
    if accuracy.high is not None and accuracy.high < CHANCE:
        yield Finding(
            "accuracy",
            f"{told}, the whole interval below chance.",
            "The labels are flipped, in training or here: a policy would learn to give the answers that people reject.",
            "See which column is the preferred one, in training and here; do not train with it before.",
            severity,
        )
        return
    beyond = (
        accuracy.low is not None and accuracy.low <= CHANCE
        if gate is None
        else accuracy.low is None or not accuracy.low > gate.min_accuracy
    )
    if beyond:
        limit = "chance" if gate is None else f"gate.min_accuracy {gate.min_accuracy:g}"
        yield Finding(
            "accuracy",
            f"{told}; the lower end must be above {limit}.",
            "A policy would be trained on a preference that may not be people's.",
            "More training pairs or a larger learner.learning_rate, and more pairs to judge by.",
            severity,
        )


def _calibration(excess: Estimate, gate: GateSettings | None) -> Iterator[Finding]:
    refused = gate is not None and (excess.high is None or not excess.high <= gate.max_calibration_excess)
    if not refused and not surely(excess, CALIBRATION_EXCESS):
        return
    limit = (
        f"; the upper end must not be above gate.max_calibration_excess {gate.max_calibration_excess:g}" if gate else ""
    )
    yield Finding(
        "calibration",
        f"The expected calibration error, after temperature scaling, is above its sampling floor by {_three(excess)}"
        f"{limit if refused else ''}.",
        "Equal differences in score mean different odds in different places: a policy chases large rewards that are no "
        "large gains.",
        "Soft labels from votes, training.label_smoothing, fewer training.epochs, or ensemble.members.",
        "refusal" if refused else "medium",
    )


def _length(length: LengthBias, gate: GateSettings | None) -> Iterator[Finding]:
    longer, paid, share = length.longer_preferred, length.overpayment, length.overpayment.share
    severity: Severity = "high" if gate is None else "refusal"
    if longer.low is not None and longer.low > LENGTH_IS_QUALITY:
        yield Finding(
            "length",
            f"People prefer the longer response in {counted(longer)}.",
            "Nothing here tells length from quality, and a policy would learn to write more.",
            "Pairs balanced in length, for training and to judge by.",
            severity,
        )
    elif paid == NOTHING_TO_PAY_FOR or longer.count < FEW_PAIRS:
        return
    elif share.high is None:
        yield Finding(
            "length",
            f"Between responses of the same length a typical score difference is worth {_three(paid.score)} in "
            "log-odds; the lower end must be above 0. Where the shorter response is the better one, accuracy is "
            f"{interval_text(length.accuracy_shorter_preferred)}; where the longer one is, "
            f"{interval_text(length.accuracy_longer_preferred)}.",
            "The model may take length for quality, and length is the first thing that a policy finds.",
            "Pairs balanced in length, for training and to judge by.",
            severity,
        )
    else:
        refused = gate is not None and not (share.high is not None and share.high <= gate.max_overpaid_length)
        if not refused and not surely(share, OVERPAYMENT):
            return
        limit = (
            f"; the upper end must not be above gate.max_overpaid_length {gate.max_overpaid_length:g}" if gate else ""
        )
        yield Finding(
            "length",
            f"Of a typical score difference {_three(share)} is paid for length beyond what people prefer it for"
            f"{limit if refused else ''}.",
            "A policy is paid for longer responses, better or not; length is the first thing that it finds.",
            "aggregation.length_penalty: fitted takes it out of the score; pairs balanced in length take it out of the "
            "model.",
            "refusal" if refused else "high" if (share.value or 0.0) > HIGH_OVERPAYMENT else "medium",
        )


def _leaks(leaked_share: float | None, gate: GateSettings | None) -> Iterator[Finding]:
    if not leaked_share:
        return
    refused = gate is not None and not leaked_share <= gate.max_leaked_share
    limit = f"; gate.max_leaked_share is {percent(gate.max_leaked_share)}" if gate and refused else ""
    yield Finding(
        "leakage",
        f"{percent(leaked_share)} of the pairs hold a text that was trained on{limit}.",
        "Accuracy on them is memory. A policy writes new texts, on which the model is worse than this report says.",
        "Split by text before training and evaluate again; leave everything else as it is until then.",
        "refusal" if refused else "high",
    )


def _failures(failed_share: float, gate: GateSettings | None) -> Iterator[Finding]:
    if failed_share == 0.0:
        return
    refused = gate is not None and not failed_share <= gate.max_failed_share
    limit = f"; gate.max_failed_share is {percent(gate.max_failed_share)}" if gate and refused else ""
    yield Finding(
        "failures",
        f"{percent(failed_share)} of the pairs hold a text that could not be scored{limit}; they are in no figure.",
        "A policy learns nothing from responses without a score, and may be led to or away from them.",
        "Their causes are below; for long ones scorer.max_length, up to what the model was trained with.",
        "refusal" if refused else "medium",
    )


def _three(estimate: Estimate) -> str:
    """`0.031 (0.012 to 0.050)`; a question mark for what is not known."""
    value, low, high = (
        "?" if part is None or math.isnan(part) else f"{part:.3f}"
        for part in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} ({low} to {high})"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
