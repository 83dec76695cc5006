"""A reward model before the bench: its pairs scored, its integrity checked, and a verdict.

What `train-rm` does at its end is what `eval-rm` does with any directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward import RewardSettings, ScorerSettings
from rlhf_ray.config.reward_model import GateSettings, RewardEvaluationConfig, RewardModelConfig
from rlhf_ray.failures import BadInput, FailureKind, Refused, RoleFailure
from rlhf_ray.models.loading import read_model_facts
from rlhf_ray.reward.core.card import MemberLayout, Probe, RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.checks import Check, vllm_check
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.advice import find
from rlhf_ray.reward.judge.benchmarks.cases import BenchmarkResult
from rlhf_ray.reward.judge.data_report import DataReport
from rlhf_ray.reward.judge.evaluation import PairEvaluation, evaluate_pairs
from rlhf_ray.reward.judge.gate import GateFigures, Verdict
from rlhf_ray.reward.judge.inputs import UsedPairs
from rlhf_ray.reward.judge.inspector import RewardInspector
from rlhf_ray.reward.judge.leakage import Leakage
from rlhf_ray.reward.judge.page import write_page
from rlhf_ray.reward.judge.policy_samples import BestOfNReport
from rlhf_ray.reward.judge.pooling_engine import PoolingEngine
from rlhf_ray.reward.judge.report import EvaluationReport, report_json
from rlhf_ray.reward.judge.scoring import ScoredPairs, score_pairs
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import Answer
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import role_group
from rlhf_ray.tracking.run_folder import write_atomic
from rlhf_ray.tracking.tracker import Tracker


def scorer_request(settings: ScorerSettings) -> RoleRequest:
    """The scorers as a role."""
    return RoleRequest("scorer", "scorer", settings)


def integrity_requests(settings: ScorerSettings, gate: GateSettings) -> list[RoleRequest]:
    """Who checks a model's integrity: one process like a scorer's, and one for vLLM."""
    one = settings.model_copy(update={"replicas": 1})
    roles = ["inspector", "pooling-engine"] if gate.vllm else ["inspector"]
    return [RoleRequest(role, "scorer", one) for role in roles]


def check_vllm(gate: GateSettings) -> None:
    """See that vLLM is there where the gate asks for its opinion.

    Raises:
        BadInput: it is not.
    """
    if gate.vllm and find_spec("vllm") is None:
        raise BadInput("gate.vllm", "true, and vLLM is not installed", "vLLM (the extra `cpu` or `gpu`), or false")


def reward_settings(model: str, settings: ScorerSettings) -> RewardSettings:
    """A scorer of one model, whatever the gate said of it before."""
    return RewardSettings(**settings.model_dump(), model=model, require_release=False)


def build_scorers(scorers: ActorGroup[RewardScorer], model: str, settings: ScorerSettings) -> None:
    """Load the model in all of them."""
    scorers.build_all(partial(RewardScorer, reward_settings(model, settings)))


@dataclass(frozen=True)
class Judged:
    """A reward model and what its scores of held-out pairs say.

    Attributes:
        model: its directory.
        card: its card, where it has one.
        used: the held-out pairs.
    """

    model: str
    card: RewardModelCard | None
    used: UsedPairs
    scored: ScoredPairs
    evaluation: PairEvaluation


def judge_pairs(
    scorers: ActorGroup[RewardScorer],
    used: UsedPairs,
    model: str,
    card: RewardModelCard | None,
    config: RewardModelConfig | RewardEvaluationConfig,
) -> Judged:
    """Score held-out pairs and judge the scores.

    Raises:
        Refused: not one pair has scores.
    """
    layout = card.layout if card else MemberLayout()
    scored = score_pairs(scorers, used, card.aggregation if card else ScoreAggregation())
    if not scored.kept:
        causes = ", ".join(f"{cause} ({count:,} texts)" for cause, count in scored.failures.items())
        raise Refused(model, (f"failures: Not one of {len(used.pairs):,} pairs has scores for both texts: {causes}.",))
    pairs = [used.pairs[index] for index in scored.kept]
    evaluation = evaluate_pairs(pairs, scored.scores, layout.attributes, config.judgement, config.run.seed)
    return Judged(model, card, used, scored, evaluation)


def _probe_texts(used: UsedPairs, count: int) -> list[str]:
    """Whole texts, taken evenly from the pairs, chosen and rejected in turn."""
    texts = [pair.prompt + (pair.chosen if index % 2 else pair.rejected) for index, pair in enumerate(used.pairs)]
    unique = list(dict.fromkeys(texts))
    return unique[:: max(len(unique) // count, 1)][:count]


def _check_integrity(
    config: RewardModelConfig | RewardEvaluationConfig, judged: Judged, tracker: Tracker
) -> tuple[Check, ...]:
    """All integrity checks, each in a process of its own: vLLM starts while the others are made."""
    model, card, gate = judged.model, judged.card, config.gate
    texts, settings = _probe_texts(judged.used, gate.probes), reward_settings(model, config.scorer)
    tolerance = gate.max_engine_difference
    requests = integrity_requests(config.scorer, gate)
    with ExitStack() as stack:
        groups = [stack.enter_context(role_group(request, config.cluster, tracker)) for request in requests]
        inspector = groups[0]
        models: list[tuple[str, str, int]] = []
        starting: list[Answer[None]] = []
        for engine in groups[1:]:
            folders = card.layout.folders if card else (".",)
            longest = card.max_length if card else read_model_facts(model, "model").context_tokens
            models = [(str(Path(model) / folder) if folder != "." else model, model, longest) for folder in folders]
            starting = engine.build(partial(PoolingEngine, *models[0]))
        inspector.build_all(partial(RewardInspector, settings))
        checks = tuple(inspector.call_all(RewardInspector.inspect, texts, tolerance)[0])
        unreadable = any(check.passed is False and check.name in ("head_saved", "loading") for check in checks)
        if not gate.vllm or unreadable:
            return checks
        probes: Sequence[Probe] = inspector.call_all(RewardInspector.probes, texts)[0]
        return (*checks, _second_opinion(groups[1], starting, models, probes, tolerance))


def _second_opinion(
    engine: ActorGroup[PoolingEngine],
    starting: Sequence[Answer[None]],
    models: Sequence[tuple[str, str, int]],
    probes: Sequence[Probe],
    tolerance: float,
) -> Check:
    """vLLM's logits of every model beside ours; an engine that cannot take a model is a failed check."""
    theirs: list[NDArray[np.float64]] = []
    try:
        engine.wait(starting)
        for number, model in enumerate(models):
            if number:
                engine.call_all(PoolingEngine.close)
                engine.build_all(partial(PoolingEngine, *model))
            theirs += engine.call_all(PoolingEngine.score_tokens, [probe.token_ids for probe in probes])
    except RoleFailure as failure:
        if failure.kind is not FailureKind.FATAL:
            raise
        return Check("vllm", False, f"vLLM cannot score it: {failure.cause}", "it cannot be served by vLLM")
    ours = np.array([probe.logits for probe in probes])
    return vllm_check(ours, np.concatenate(theirs, axis=1), tolerance)


def conclude(
    config: RewardModelConfig | RewardEvaluationConfig,
    judged: Judged,
    tracker: Tracker,
    record: Callable[[Verdict], object],
    *,
    gate: bool,
    leakage: Leakage | None,
    data: DataReport | None = None,
    benchmarks: tuple[BenchmarkResult, ...] = (),
    best_of_n: BestOfNReport | None = None,
) -> EvaluationReport:
    """From scores to `evaluation.json`, `evaluation.html` and, with `gate`, a verdict.

    Args:
        record: keeps the verdict before the report tells of it.
        gate: also check the model's integrity and judge it.
        data: of the training data, where they were read.
    """
    evaluation, used, card = judged.evaluation, judged.used, judged.card
    checks: tuple[Check, ...] = ()
    if gate:
        tracker.phase("checking the reward model's integrity")
        checks = _check_integrity(config, judged, tracker)
    findings = find(
        evaluation,
        GateFigures.of(evaluation, len(used.pairs), leakage),
        gate=config.gate if gate else None,
        checks=checks,
        leakage=leakage,
        data=data,
        best_of_n=best_of_n,
        cut_pairs=used.left_out.cut,
    )
    verdict = Verdict.of(findings) if gate else None
    if verdict is not None:
        record(verdict)
        tracker.events.write("judged", released=verdict.released, refusals=list(verdict.refusals))
    report = EvaluationReport(
        name=config.run.name,
        model=judged.model,
        version=card.version if card else "",
        pairs=evaluation,
        failures=judged.scored.failures,
        failed_texts=judged.scored.failed_texts,
        cut_pairs=used.left_out.cut,
        leakage=leakage,
        data=data,
        benchmarks=benchmarks,
        best_of_n=best_of_n,
        checks=checks,
        findings=findings,
        verdict=verdict,
        wall_s=tracker.wall_s,
    )
    write_atomic(tracker.folder.evaluation, report_json(report))
    write_page(tracker.folder.evaluation_page, report)
    return report
