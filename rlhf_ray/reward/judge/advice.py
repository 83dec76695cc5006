"""What the numbers of an evaluation mean for a policy that is trained with the reward model, and what to change.

Every rule compares a number with a threshold and, where a number is an estimate, with its interval: what sampling
alone explains is no finding. The findings are ordered by severity; among equals come first those that cast doubt on
every other number, then those that a policy exploits first, then those that cost a little everywhere. That order is a
rule of thumb, the thresholds are too; both are here to be argued with. The figures that may refuse a model have their
rules in `gate.py`, those of the data in `data_report.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_ray.config.reward_model import GateSettings
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.accuracy import StratumAccuracy
from rlhf_ray.reward.judge.bias import FormatArtefact
from rlhf_ray.reward.judge.data_report import NOTICEABLE_SHARE, DataReport, data_findings, leaks_found, low_ceiling
from rlhf_ray.reward.judge.disagreement import DisagreementReport
from rlhf_ray.reward.judge.evaluation import Histogram, PairEvaluation
from rlhf_ray.reward.judge.findings import Finding, by_severity, interval_text, percent, surely
from rlhf_ray.reward.judge.gate import (
    CALIBRATION_EXCESS,
    CHANCE,
    FEW_PAIRS,
    OVERPAYMENT,
    GateFigures,
    gate_findings,
)
from rlhf_ray.reward.judge.groups import Proportion
from rlhf_ray.reward.judge.leakage import Leakage

if TYPE_CHECKING:
    # Whoever reads findings needs none of the engines that sampled.
    from rlhf_ray.reward.judge.policy_samples import BestOfNReport, RewardSpread

ROOM_TO_CEILING = 0.05  # Nearer to the ceiling, its own error (few votes a pair) is as large as the room.
MUCH_ROOM_TO_CEILING = 0.15  # Every seventh pair: no longer a matter of fine tuning.
WIDE_INTERVAL = 0.06  # Most changes move accuracy by one to three points, which such an interval hides.
WEAK_STRATUM = 0.05  # Behind the whole by as much as a new backbone typically brings.
USEFUL_AUROC = 0.6  # Below, setting aside the pairs that members differ on removes hardly more errors than chance.
LOST_GAIN = 0.1  # A tenth of the gain at the peak; smaller drops are within the noise of a few hundred prompts.
FLAT_PROMPTS = 0.05  # Prompts without a difference in reward have no gradient; PPO pays for sampling them.
BETWEEN_PROMPTS = 0.9  # The rest, within prompts, is all that a policy can change.
WEAK_RANKING = 0.1  # Spearman within a prompt; below, proxy and judge order a prompt's samples almost independently.
OFF_CENTRE_STDS = 2.0  # All scores then have one sign, and clipping or a critic that starts at 0 takes notice.
POSITION_BIAS = 0.05  # Raters who take the first response in 55 % of the pairs or more.


def find(
    evaluation: PairEvaluation,
    figures: GateFigures,
    *,
    gate: GateSettings | None = None,
    checks: Sequence[Check] = (),
    leakage: Leakage | None = None,
    data: DataReport | None = None,
    best_of_n: BestOfNReport | None = None,
    cut_pairs: int = 0,
) -> tuple[Finding, ...]:
    """Everything worth changing, the most important first.

    Args:
        figures: of the evaluation, as the gate looks at them.
        gate: None where it is not asked.
        cut_pairs: pairs of which a text was cut.
    """
    return by_severity(
        [
            *gate_findings(figures, checks, gate),
            *leaks_found("held-out", "training", leakage, texts=False),
            *_room(evaluation),
            *_policy(best_of_n, single_judge=evaluation.disagreement is None),
            *_sources(evaluation),
            *_attributes(evaluation),
            *_labels(evaluation, seen_before=data is not None and data.held_out is not None),
            *(data_findings(data, held_out_leaks=False) if data is not None else ()),
            *_gaps(evaluation.by_gap),
            *_scale_of_differences(evaluation),
            *_formats(evaluation.formats),
            *_disagreement(evaluation.disagreement),
            *_cut(evaluation.pairs, cut_pairs),
            *_scale(evaluation.scores),
        ]
    )


def _room(evaluation: PairEvaluation) -> Iterator[Finding]:
    accuracy, ceiling, votes = evaluation.accuracy, evaluation.ceiling.accuracy, evaluation.vote_accuracy
    if accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return
    if accuracy.low > CHANCE and ceiling is not None and votes is not None and votes < ceiling - ROOM_TO_CEILING:
        yield Finding(
            "accuracy",
            f"Accuracy is {interval_text(accuracy)}. It agrees with {percent(votes)} of single votes; raters agree "
            f"enough for {percent(ceiling)}.",
            "Where people are clear and the model is wrong, a policy learns the mistake.",
            "More training pairs like these, a larger backbone (model), more of it trained "
            "(learner.trainable_top_layers, training.lora) or more training.epochs with training.patience.",
            "high" if ceiling - votes > MUCH_ROOM_TO_CEILING else "medium",
        )
    width = accuracy.high - accuracy.low
    if width > WIDE_INTERVAL:
        needed = round(evaluation.pairs * (width / WIDE_INTERVAL) ** 2, -2)
        yield Finding(
            "evidence",
            f"The accuracy is known to ± {100 * width / 2:.1f} points only.",
            "A change that helps cannot be told from one that does harm, and weak spots stay unseen.",
            f"About {needed:,.0f} held-out pairs, on as many more prompts, would do for ± {50 * WIDE_INTERVAL:.0f}.",
            "medium" if width > 2 * WIDE_INTERVAL else "low",
        )


def _policy(report: BestOfNReport | None, single_judge: bool) -> Iterator[Finding]:
    if report is None:
        return
    yield from _peak(report, single_judge)
    yield from _spread(report.spread)
    agreement = report.agreement
    if agreement.correlation is not None and agreement.high is not None and agreement.high < WEAK_RANKING:
        yield Finding(
            "policy",
            f"Among the policy's samples for one prompt, reward and {report.judge} have a rank correlation of "
            f"{agreement.correlation:+.2f}.",
            "The model tells apart what people compared, and not what this policy writes: its reward leads nowhere.",
            "Comparisons of this policy's own samples among the training pairs.",
            "high",
        )


def _peak(report: BestOfNReport, single_judge: bool) -> Iterator[Finding]:
    curve = report.curve
    first, last = curve.points[0], curve.points[-1]
    peak = next(point for point in curve.points if point.n == curve.peak_n)
    if curve.drop.low is None or curve.drop.low <= 0:
        return
    if peak.n == first.n:
        yield Finding(
            "over-optimisation",
            f"By {report.judge}, what is picked by reward among {last.n} is worse than a random sample.",
            "What the model rewards in this policy's samples is not what the judge values: training would move the "
            "policy and not improve it.",
            "See whether the judge measures what the pairs do; if so, comparisons of this policy's samples.",
            "high",
        )
    elif peak.gold - last.gold > LOST_GAIN * (peak.gold - first.gold):
        nats = curve.peak_sqrt_kl**2
        ensemble = " ensemble.members with aggregation.members: minimum or mean_minus_variance moves the peak outwards."
        yield Finding(
            "over-optimisation",
            f"The gain by {report.judge} peaks at best of {peak.n} (√KL {curve.peak_sqrt_kl:.2f}) and is smaller at "
            f"best of {last.n}, while the reward goes on rising.",
            "Over-optimisation: beyond that pressure a policy is selected for the model's mistakes.",
            f"A stronger KL penalty: algorithm.kl.coefficient up, algorithm.kl.stop_above near {nats:.1f} nats to "
            "begin with (PPO spends more KL on the same gain than best-of-n does)."
            f"{ensemble if single_judge else ''} Cleaner labels and more pairs move the peak, too.",
            "high" if last.gold <= first.gold else "medium",
        )


def _spread(spread: RewardSpread) -> Iterator[Finding]:
    if spread.flat_prompts > FLAT_PROMPTS:
        yield Finding(
            "spread",
            f"For {percent(spread.flat_prompts)} of the prompts all samples of the policy have the same reward.",
            "There is no gradient from such prompts, however accurate the model is on pairs.",
            "More diverse samples (sampling.temperature), other prompts, or training pairs as alike as these samples.",
            "medium",
        )
    elif spread.between_prompt_share is not None and spread.between_prompt_share > BETWEEN_PROMPTS:
        yield Finding(
            "spread",
            f"{percent(spread.between_prompt_share)} of the variance of the reward lies between prompts.",
            "A policy can change only the rest: the objective is flat, and learning slow.",
            "A baseline for each prompt (algorithm.advantage: rloo or grpo), and pairs that share their prompt.",
            "medium",
        )


def _sources(evaluation: PairEvaluation) -> Iterator[Finding]:
    weak = _weak(evaluation.by_source, evaluation.accuracy)
    if not weak:
        return
    below = any(each.accuracy.high is not None and each.accuracy.high < CHANCE for each in weak)
    yield Finding(
        "sources",
        f"Accuracy is lower on {_listed(weak)}, against {interval_text(evaluation.accuracy)} on all pairs.",
        "On prompts of this kind the policy learns the wrong thing, and the mean does not show it."
        + (" Below chance, the labels themselves may be turned." if below else ""),
        "More training pairs of these sources, or a look at their labels; until then fewer of their prompts in PPO.",
        "high" if below else "medium",
    )


def _attributes(evaluation: PairEvaluation) -> Iterator[Finding]:
    unsure = [
        each.name
        for each in evaluation.by_attribute[1:]
        if each.accuracy.low is not None and each.accuracy.low <= CHANCE and each.accuracy.count >= FEW_PAIRS
    ]
    if unsure:
        yield Finding(
            "attributes",
            f"The heads for {', '.join(unsure)} may be at chance.",
            "With a weight in the score they add noise to the reward.",
            "A weight of 0 in aggregation.attributes, or more pairs that have these attributes.",
            "medium",
        )


def _labels(evaluation: PairEvaluation, seen_before: bool) -> Iterator[Finding]:
    if not seen_before:
        yield from low_ceiling("labels", evaluation.ceiling)
    if evaluation.position is not None and _off(evaluation.position, CHANCE, POSITION_BIAS):
        yield Finding(
            "labels",
            f"The response shown first is preferred in {interval_text(evaluation.position)} of the pairs.",
            "Part of the labels is about places, not texts.",
            "Show responses to raters in random order; ask twice, once each way.",
            "low",
        )


def _gaps(by_gap: Sequence[StratumAccuracy]) -> Iterator[Finding]:
    if len(by_gap) < 2:
        return
    smallest, largest = by_gap[0], by_gap[-1]
    if smallest.accuracy.low is None or smallest.accuracy.low > CHANCE or smallest.accuracy.count < FEW_PAIRS:
        return
    yield Finding(
        "gaps",
        f"Where raters are nearly undecided (gap {smallest.name}) accuracy may be chance: "
        f"{interval_text(smallest.accuracy)}, against {interval_text(largest.accuracy)} at {largest.name}.",
        "As a policy improves its samples grow alike, and what is left to tell apart is of this kind.",
        "More training pairs with small gaps and more raters each; a lower pairs.min_gap if it leaves them out.",
        "low",
    )


def _scale_of_differences(evaluation: PairEvaluation) -> Iterator[Finding]:
    plain, temperature = evaluation.calibration, evaluation.temperature.temperature
    if surely(evaluation.scaled.excess, CALIBRATION_EXCESS) or evaluation.temperature.at_bound:
        return
    if surely(plain.excess, CALIBRATION_EXCESS):
        direction = "too sure" if temperature > 1 else "not sure enough"
        yield Finding(
            "scale",
            f"The calibration error is {plain.ece:.3f} (floor {plain.floor.mean:.3f}) "
            f"as it is, and {evaluation.scaled.ece:.3f} with temperature {temperature:.2f}.",
            f"Score differences are {direction}. Their order, and so the accuracy, is right; rewards are too "
            f"{'large' if temperature > 1 else 'small'} for a KL coefficient chosen elsewhere.",
            "Recalibrate: divide differences by the temperature stored with the model where they are read as "
            "probabilities; in PPO set algorithm.kl.coefficient for this scale, or algorithm.reward_whiten.",
            "low",
        )


def _formats(formats: Sequence[FormatArtefact]) -> Iterator[Finding]:
    found = [
        each for each in formats if each.pairs_that_differ >= FEW_PAIRS and surely(each.overpayment.share, OVERPAYMENT)
    ]
    if found:
        told = "; ".join(f"{each.name}: {interval_text(each.overpayment.share)}" for each in found)
        yield Finding(
            "format",
            f"Of a typical score difference this is paid for format beyond what people prefer it for: {told}.",
            "A policy takes up the format, for it is easier to produce than quality.",
            "Pairs with equal content in different formats, labelled as ties; or formatting stripped from training.",
            "medium",
        )


def _disagreement(report: DisagreementReport | None) -> Iterator[Finding]:
    if report is None or report.auroc.low is None or report.auroc.high is None:
        return
    told = f"{report.auroc.value:.2f} ({report.auroc.low:.2f}–{report.auroc.high:.2f})"
    if report.auroc.high < USEFUL_AUROC or report.auroc.low <= CHANCE:
        yield Finding(
            "ensemble",
            f"Disagreement of the members hardly foretells errors: area under the ROC curve {told}, chance is 0.5.",
            "Minimum or variance penalty then protect from nothing and add noise.",
            "More independent members: ensemble.kind: independent, ensemble.bootstrap: true, more ensemble.members; "
            "until then aggregation.members: mean.",
            "low",
        )


def _cut(pairs: int, cut_pairs: int) -> Iterator[Finding]:
    if cut_pairs > NOTICEABLE_SHARE * pairs:
        yield Finding(
            "cut texts",
            f"{cut_pairs:,} pairs ({percent(cut_pairs / pairs)}) were cut at the front and judged without their "
            "beginning.",
            "Where the question is cut off, the model judges an answer to nothing.",
            "A larger training.max_length, and scorer.max_length with it.",
            "medium",
        )


def _scale(scores: Histogram) -> Iterator[Finding]:
    if scores.std > 0 and abs(scores.mean) > OFF_CENTRE_STDS * scores.std:
        yield Finding(
            "scores",
            f"Scores lie around {scores.mean:+.2f} with a standard deviation of {scores.std:.2f}, far from 0.",
            "Nearly all rewards have one sign; a critic that starts at 0 spends its first steps on the offset, and "
            "algorithm.score_clip cuts one side.",
            "A larger training.centering, or algorithm.reward_whiten in PPO.",
            "low",
        )


def _clearly_below(one: Proportion, other: Proportion, distance: float) -> bool:
    if one.value is None or one.high is None or other.value is None or other.low is None:
        return False
    return one.count >= FEW_PAIRS and one.value < other.value - distance and one.high < other.low


def _off(share: Proportion, expected: float, distance: float) -> bool:
    if share.value is None or share.low is None or share.high is None:
        return False
    return abs(share.value - expected) > distance and not share.low <= expected <= share.high


def _weak(strata: Sequence[StratumAccuracy], overall: Proportion) -> list[StratumAccuracy]:
    """Those clearly behind the whole, the worst first."""
    weak = [each for each in strata if _clearly_below(each.accuracy, overall, WEAK_STRATUM)]
    return sorted(weak, key=lambda each: each.accuracy.value or 0.0)


def _listed(strata: Sequence[StratumAccuracy], limit: int = 3) -> str:
    told = "; ".join(f"{each.name}: {interval_text(each.accuracy)}" for each in strata[:limit])
    return told + (f" and {len(strata) - limit} more" if len(strata) > limit else "")
