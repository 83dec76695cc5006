"""`rlhf-ray eval-rm`: judge any reward model's directory on pairs, published benchmarks and a policy's samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward import ScorerSettings
from rlhf_ray.config.reward_model import JUDGES_WITHOUT_MODEL, BestOfNSettings, RewardEvaluationConfig
from rlhf_ray.failures import BadInput, Refused
from rlhf_ray.reward.core.card import RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.judge.benchmarks import item_text, load_benchmark, score_benchmark
from rlhf_ray.reward.judge.benchmarks.cases import Benchmark, BenchmarkResult
from rlhf_ray.reward.judge.gate import Verdict
from rlhf_ray.reward.judge.inputs import UsedPairs, read_pairs
from rlhf_ray.reward.judge.judging import (
    build_scorers,
    check_vllm,
    conclude,
    integrity_requests,
    judge_pairs,
    scorer_request,
)
from rlhf_ray.reward.judge.leakage import Leakage, TrainingTexts, hash_pairs
from rlhf_ray.reward.judge.policy_samples import (
    BestOfNReport,
    PolicySamples,
    TextScorer,
    judge_samples,
    load_samples,
    read_policy,
    report_best_of_n,
    sample_policy,
    score_samples,
)
from rlhf_ray.reward.judge.report import headline
from rlhf_ray.reward.judge.scoring import score_all
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import connected, role_group
from rlhf_ray.tracking.tracker import Tracker, check_folder, open_folder


def run_evaluation(config: RewardEvaluationConfig, gate: bool) -> None:
    """Everything `rlhf-ray eval-rm` does.

    Args:
        gate: also check the model's integrity and judge it.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a role failed, died or did not answer.
        Refused: with `gate`, after the report was written.
    """
    check_folder(config)
    if gate:
        check_vllm(config.gate)
    texts = read_texts(config.model, "model", config.scorer)
    card = texts.card
    if gate and config.gate.record and card is None:
        raise BadInput("gate.record", f"true, and '{config.model}' has no card", "a model of train-rm, or false")
    used = read_pairs(config.pairs, "pairs.path", texts, config.scorer.on_too_long, "scorer")
    leakage = _leakage(config, used, texts)
    benchmarks = [
        load_benchmark(settings.name, settings.path, f"benchmarks.{index}.path")
        for index, settings in enumerate(config.benchmarks)
    ]
    samples = _read_samples(config.best_of_n)
    policy = read_policy(config.best_of_n) if config.best_of_n is not None and samples is None else None
    if config.best_of_n is not None and config.best_of_n.judge not in JUDGES_WITHOUT_MODEL:
        read_texts(config.best_of_n.judge, "best_of_n.judge", config.scorer)
    phases = [[scorer_request(config.scorer)]]
    if policy is not None:
        phases.append([RoleRequest("generator", "best_of_n.generator", policy.settings.generator)])
    if gate:
        phases.append(integrity_requests(config.scorer, config.gate))
    with connected(config.cluster, phases), open_folder(config) as folder:
        title = f"evaluation {config.run.name} · {config.model}"
        with Tracker(config, "reward_model", folder, title, 0, ()) as tracker:
            if policy is not None:
                tracker.phase("sampling the policy")
                samples = sample_policy(policy, config.cluster, config.run.seed, tracker)
            if samples is not None and (samples.num_skipped or samples.num_surplus):
                skipped, surplus = samples.num_skipped, samples.num_surplus
                tracker.events.write("samples_left_out", skipped_prompts=skipped, surplus_responses=surplus)
                tracker.display.message(f"left out: {skipped} prompts, and {surplus} responses that others lack")
            with role_group(scorer_request(config.scorer), config.cluster, tracker) as scorers:
                tracker.phase("loading the reward model")
                build_scorers(scorers, config.model, config.scorer)
                tracker.phase("scoring pairs")
                try:
                    judged = judge_pairs(scorers, used, config.model, card, config)
                except Refused as refusal:
                    if gate:
                        _record(config, card, Verdict(False, refusal.refusals))
                    raise
                results = []
                for benchmark in benchmarks:
                    tracker.phase(f"scoring {benchmark.name}")
                    results.append(_score_benchmark(_text_scorer(scorers, config.scorer, card), benchmark, texts))
                best_of_n = None
                if samples is not None and config.best_of_n is not None:
                    tracker.phase("best of n")
                    best_of_n = _best_of_n(config, samples, scorers, texts)
            report = conclude(
                config,
                judged,
                tracker,
                partial(_record, config, card),
                gate=gate,
                leakage=leakage,
                benchmarks=tuple(results),
                best_of_n=best_of_n,
            )
            summary = {"name": config.run.name, "model": config.model, "reward_model": headline(judged.evaluation)}
            verdict = report.verdict
            released = None if verdict is None else verdict.released
            tracker.finish(summary | {"released": released, "wall_s": tracker.wall_s})
    if verdict is not None and not verdict.released:
        raise Refused(config.model, verdict.refusals)


def _record(config: RewardEvaluationConfig, card: RewardModelCard | None, verdict: Verdict) -> None:
    """The verdict, into the model's card, if that is wanted."""
    if card is not None and config.gate.record:
        card.model_copy(update={"released": verdict.released, "refusals": verdict.refusals}).save(Path(config.model))


def read_texts(model: str, key: str, scorer: ScorerSettings) -> RewardTexts:
    """How a reward model is shown text.

    Raises:
        BadInput: it is none.
    """
    return RewardTexts.read(model, scorer.max_length, key, "scorer")


def _leakage(config: RewardEvaluationConfig, used: UsedPairs, texts: RewardTexts) -> Leakage | None:
    """Against what the model's own record and `training_pairs` hold."""
    known = [TrainingTexts.load(config.model, "model")]
    if config.training_pairs is not None:
        read = read_pairs(config.training_pairs, "training_pairs.path", texts, "truncate")
        known.append(TrainingTexts.of(hash_pairs(read.pairs)))
    sets = [each for each in known if each is not None]
    return TrainingTexts.of(*sets).leakage(hash_pairs(used.pairs)) if sets else None


def _read_samples(settings: BestOfNSettings | None) -> PolicySamples | None:
    if settings is None or settings.path is None:
        return None
    return load_samples(settings.path, "best_of_n.path", judged=settings.judge == "samples")


def _score_benchmark(score: TextScorer, benchmark: Benchmark, texts: RewardTexts) -> BenchmarkResult:
    templated = texts.tokenizer.chat_template is not None
    encoded = [texts.encode(item_text(item, texts.tokenizer), templated=templated) for item in benchmark.items]
    # Published figures are of texts that are scored alone.
    return score_benchmark(benchmark, score(encoded, np.arange(len(encoded))))


def _best_of_n(
    config: RewardEvaluationConfig, samples: PolicySamples, scorers: ActorGroup[RewardScorer], texts: RewardTexts
) -> BestOfNReport:
    """Ranked by the reward model, judged by the second judge (for which a reward model takes its place for a while)."""
    settings = config.best_of_n
    assert settings is not None, "called with the section only"
    proxy = score_samples(samples, texts, _text_scorer(scorers, config.scorer, texts.card))
    if settings.judge in JUDGES_WITHOUT_MODEL:
        gold = judge_samples(samples, settings.judge)
    else:
        build_scorers(scorers, settings.judge, config.scorer)
        judge = read_texts(settings.judge, "best_of_n.judge", config.scorer)
        gold = score_samples(samples, judge, _text_scorer(scorers, config.scorer, judge.card))
    return report_best_of_n(proxy, gold, settings.judge, truncated_share=samples.truncated_share)


def _text_scorer(
    scorers: ActorGroup[RewardScorer], settings: ScorerSettings, card: RewardModelCard | None
) -> TextScorer:
    """Scores by the model that the scorers have; NaN where a text is too long to be scored as it is.

    Args:
        card: of that model.
    """
    aggregation = card.aggregation if card else ScoreAggregation()

    def score(encoded: Sequence[Encoded], prompts: NDArray[np.int64]) -> NDArray[np.float64]:
        result = np.full(len(encoded), math.nan)
        kept = [row for row, (_, was_cut) in enumerate(encoded) if not (was_cut and settings.on_too_long == "fail")]
        if not kept:
            return result
        tokens = [tuple(encoded[row][0]) for row in kept]
        unique = {text: place for place, text in enumerate(dict.fromkeys(tokens))}
        scored, places = score_all(scorers, list(unique)), [unique[text] for text in tokens]
        result[kept], _ = aggregation.scores(scored.heads[places], scored.num_tokens[places], prompts[kept])
        return result

    return score
