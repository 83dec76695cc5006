"""All that one evaluation of a reward model found, as one value: `evaluation.json`, and what the page shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.benchmarks.cases import BenchmarkResult
from rlhf_ray.reward.judge.data_report import DataReport
from rlhf_ray.reward.judge.evaluation import PairEvaluation
from rlhf_ray.reward.judge.findings import Finding
from rlhf_ray.reward.judge.gate import Verdict
from rlhf_ray.reward.judge.leakage import Leakage

if TYPE_CHECKING:
    # Whoever only reads a report needs none of the engines that sampled it.
    from rlhf_ray.reward.judge.policy_samples import BestOfNReport


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation. What was not looked at is None or empty.

    Attributes:
        name: of the run.
        model: directory of the reward model.
        version: from its card; empty without one.
        pairs: figures on the pairs.
        failures: why texts have no score, with how often.
        failed_texts: texts without a score.
        cut_pairs: pairs of which a text was cut.
        leakage: of these pairs into training; None where the training texts are not known.
        data: of the training data.
        benchmarks: published ones.
        best_of_n: the reward model under a policy.
        checks: of its integrity.
        findings: what to change, the most important first.
        verdict: of the release gate; None where it was not asked.
        wall_s: duration of the run, with the training where there was one.
    """

    name: str
    model: str
    version: str
    pairs: PairEvaluation
    failures: dict[str, int]
    failed_texts: int
    cut_pairs: int
    leakage: Leakage | None
    data: DataReport | None
    benchmarks: tuple[BenchmarkResult, ...]
    best_of_n: BestOfNReport | None
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict | None
    wall_s: float


def report_json(report: EvaluationReport) -> str:
    """The report as JSON, with the names of the dataclasses.

    Raises:
        ValueError: a number is not finite; what is undefined is None.
    """
    return json.dumps(asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def headline(evaluation: PairEvaluation) -> dict[str, float | int | str | None]:
    """The figures that go with the model, into its card and the run's summary."""
    accuracy, scaled = evaluation.accuracy, evaluation.scaled
    return {
        "pairs": evaluation.pairs,
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "vote_accuracy": evaluation.vote_accuracy,
        "vote_ceiling": evaluation.ceiling.accuracy,
        "calibration_error": evaluation.calibration.ece,
        "calibration_error_scaled": scaled.ece,
        "calibration_floor": scaled.floor.mean,
        "temperature": None if evaluation.temperature.at_bound else evaluation.temperature.temperature,
        "overpaid_length": evaluation.length.overpayment.share.value,
        "accuracy_shorter_preferred": evaluation.length.accuracy_shorter_preferred.value,
    }
