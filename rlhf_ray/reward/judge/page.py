"""The evaluation of a reward model as one page: the verdict, what to change first, then every figure with its plot.

The page is one file with no outside hosts. What was not looked at has no section on it. Its words are in the template;
here are the figures at its top, and the pictures that are put together from several parts of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from rlhf_ray.reward.judge import plots
from rlhf_ray.reward.judge.accuracy import StratumAccuracy
from rlhf_ray.reward.judge.bias import LengthBias
from rlhf_ray.reward.judge.evaluation import AttributeAccuracy, PairEvaluation
from rlhf_ray.reward.judge.findings import interval_text, percent
from rlhf_ray.reward.judge.gate import CHANCE
from rlhf_ray.reward.judge.plots import LabelledEstimate, Reference
from rlhf_ray.reward.judge.report import EvaluationReport
from rlhf_ray.tracking.report import Headline, render_page
from rlhf_ray.tracking.run_folder import write_atomic


def write_page(path: Path, report: EvaluationReport) -> None:
    """Write the report as a page.

    Args:
        path: the file.
    """
    page = render_page(
        "rlhf_ray.reward.judge",
        "evaluation.html.jinja",
        title=report.name,
        headlines=_headlines(report),
        report=report,
        pairs=report.pairs,
        percent=percent,
        interval=interval_text,
        pictures=plots,
        accuracies=_accuracies,
        by_length=_by_length,
        overpayments=_overpayments,
    )
    write_atomic(path, page)


def _headlines(report: EvaluationReport) -> list[Headline]:
    pairs, ceiling, votes = report.pairs, report.pairs.ceiling.accuracy, report.pairs.vote_accuracy
    accuracy, overpaid = pairs.accuracy, pairs.length.overpayment.share
    grave = {finding.name for finding in report.findings if finding.severity in ("refusal", "high")}

    def tone(name: str) -> str:
        return "bad" if name in grave else ""

    range_text = (
        "no interval"
        if accuracy.low is None or accuracy.high is None
        else f"{100 * accuracy.low:.1f}–{100 * accuracy.high:.1f} %"
    )
    found = [
        Headline(
            "Accuracy",
            "–" if accuracy.value is None else percent(accuracy.value),
            f"{range_text}; "
            + (
                "no raters' ceiling known"
                if ceiling is None or votes is None
                else f"{percent(votes)} of single votes, where the raters' ceiling is {percent(ceiling)}"
            ),
            tone("accuracy"),
        ),
        Headline(
            "Calibration error",
            f"{pairs.scaled.ece:.3f}",
            f"scaled by T = {pairs.temperature.temperature:.2f}; floor {pairs.scaled.floor.mean:.3f}; "
            f"{pairs.calibration.ece:.3f} as it is",
            tone("calibration"),
        ),
    ]
    if overpaid.value is not None:
        found.append(
            Headline(
                "Overpaid for length",
                percent(overpaid.value),
                f"{interval_text(overpaid)} of a typical score difference",
                tone("length"),
            )
        )
    if report.leakage is not None:
        texts = report.leakage.texts
        found.append(
            Headline(
                "Leaked pairs",
                f"{texts.count:,}",
                f"{percent(texts.share)} hold a text from training",
                tone("leakage"),
            )
        )
    if report.best_of_n is not None:
        curve = report.best_of_n.curve
        found.append(
            Headline("Judge peaks at", f"n = {curve.peak_n}", f"of {curve.points[-1].n}; √KL {curve.peak_sqrt_kl:.2f}")
        )
    return found


def _accuracies(strata: Sequence[StratumAccuracy | AttributeAccuracy], overall: float | None) -> Markup:
    """Accuracy in parts of the pairs, beside that in all of them."""
    references = [Reference(CHANCE, "chance", "dotted")]
    if overall is not None:
        references.append(Reference(overall, "all", "solid"))
    estimates = [LabelledEstimate.of(each.name, each.accuracy) for each in strata]
    return plots.intervals(estimates, references, "accuracy", (0.45, 1.0))


def _by_length(length: LengthBias) -> Markup:
    """Accuracy where the longer response is preferred, and where the shorter one is."""
    sides = [
        LabelledEstimate.of("longer one preferred", length.accuracy_longer_preferred),
        LabelledEstimate.of("shorter one preferred", length.accuracy_shorter_preferred),
    ]
    return plots.intervals(sides, [Reference(CHANCE, "chance", "dotted")], "accuracy", (0.45, 1.0))


def _overpayments(pairs: PairEvaluation) -> Markup | None:
    """What the score overpays, by feature; None where that is known of none."""
    features = [("length", pairs.pairs, pairs.length.overpayment.share)]
    features += [(each.name, each.pairs_that_differ, each.overpayment.share) for each in pairs.formats]
    estimates = [
        LabelledEstimate(name, found.value, found.low, found.high, count)
        for name, count, found in features
        if found.value is not None
    ]
    if not estimates:
        return None
    zero = [Reference(0.0, "none", "dotted")]
    return plots.intervals(estimates, zero, "share", (-0.5, 0.5), form="+.2f", unit="pairs that differ")
