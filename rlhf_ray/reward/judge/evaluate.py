"""`rlhf-ray eval-rm`: judge any reward model's directory on pairs, published benchmarks and a policy's samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward_model import JUDGES_WITHOUT_MODEL, BestOfNSettings, RewardEvaluationConfig
from rlhf_ray.config.settings import ScorerSettings
from rlhf_ray.failures import Refused
from rlhf_ray.models.loading import check_tokenizer_fits, read_model_facts
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.core.loading import RewardEncoding, check_reward_model
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.core.texts import templated_tokenizer
from rlhf_ray.reward.judge.benchmarks import item_text, load_benchmark, score_benchmark
from rlhf_ray.reward.judge.benchmarks.cases import Benchmark, BenchmarkResult
from rlhf_ray.reward.judge.gate import GateFigures, Verdict, judge
from rlhf_ray.reward.judge.inputs import UsedPairs, read_pairs
from rlhf_ray.reward.judge.judging import (
    build_scorers,
    check_integrity,
    integrity_requests,
    judge_pairs,
    probe_texts,
    scorer_request,
    write_report,
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


@dataclass(frozen=True)
class RewardText:
    """How a reward model is given text: its tokenizer with its own template, and its encoding."""

    tokenizer: Any
    encoding: RewardEncoding
    on_too_long: Literal["fail", "truncate"]

    def tokens(self, text: str, templated: bool) -> tuple[int, ...] | None:
        """Token ids of a whole text; None where it is too long to be scored as it is."""
        token_ids, was_cut = self.encoding.encode(text, self.tokenizer, templated=templated)
        return None if was_cut and self.on_too_long == "fail" else tuple(token_ids)


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
    card = RewardModelCard.load(config.model, "model")
    text = read_reward_text(config.model, "model", config.scorer, card)
    used = read_pairs(config.pairs, "pairs.path", text.tokenizer, text.encoding, config.scorer.on_too_long, "scorer")
    leakage = _leakage(config, used, text)
    benchmarks = [
        load_benchmark(settings.name, settings.path, f"benchmarks.{index}.path")
        for index, settings in enumerate(config.benchmarks)
    ]
    samples = _read_samples(config.best_of_n)
    policy = read_policy(config.best_of_n) if config.best_of_n is not None and samples is None else None
    if config.best_of_n is not None and config.best_of_n.judge not in JUDGES_WITHOUT_MODEL:
        judge_card = RewardModelCard.load(config.best_of_n.judge, "best_of_n.judge")
        read_reward_text(config.best_of_n.judge, "best_of_n.judge", config.scorer, judge_card)
    phases = [[scorer_request(config.scorer)]]
    if policy is not None:
        phases.append([RoleRequest("generator", "best_of_n.generator", policy.settings.generator)])
    if gate:
        phases.append(integrity_requests(config.scorer, config.gate))
    with connected(config.cluster, phases):
        folder = open_folder(config)
        title = f"evaluation {config.run.name} · {config.model}"
        with Tracker(config, "reward_model", folder, title, 0, ()) as tracker:
            if policy is not None:
                tracker.phase("sampling the policy")
                samples = sample_policy(policy, config.cluster, config.run.seed, folder.logs)
            if samples is not None and (samples.num_skipped or samples.num_surplus):
                skipped, surplus = samples.num_skipped, samples.num_surplus
                tracker.events.write("samples_left_out", skipped_prompts=skipped, surplus_responses=surplus)
                tracker.display.message(f"left out: {skipped} prompts, and {surplus} responses that others lack")
            with role_group(scorer_request(config.scorer), config.cluster, folder.logs) as scorers:
                tracker.phase("loading the reward model")
                build_scorers(scorers, config.model, config.scorer)
                tracker.phase("scoring pairs")
                scored, evaluation = judge_pairs(scorers, used, card, config.judgement, config.run.seed)
                results = [_score_benchmark(scorers, benchmark, text, tracker) for benchmark in benchmarks]
                best_of_n = None
                if samples is not None and config.best_of_n is not None:
                    tracker.phase("best of n")
                    best_of_n = _best_of_n(config, samples, scorers, text)
            checks: tuple[Check, ...] = ()
            verdict: Verdict | None = None
            if gate:
                tracker.phase("checking the reward model's integrity")
                texts = probe_texts(used, config.gate.probes)
                checks = check_integrity(
                    config.model, card, texts, config.scorer, config.gate, config.cluster, folder.logs
                )
                figures = GateFigures.of(evaluation, len(used.pairs), leakage)
                verdict = judge(figures, checks, config.gate)
                if card is not None and config.gate.record:
                    update = {"released": verdict.released, "refusals": verdict.refusals}
                    card.model_copy(update=update).save(Path(config.model))
            write_report(
                folder,
                config.run.name,
                config.model,
                card,
                evaluation,
                scored,
                used,
                leakage=leakage,
                benchmarks=tuple(results),
                best_of_n=best_of_n,
                checks=checks,
                verdict=verdict,
                wall_s=tracker.wall_s,
            )
            summary = {"name": config.run.name, "model": config.model, "reward_model": headline(evaluation)}
            released = None if verdict is None else verdict.released
            tracker.finish(summary | {"released": released, "wall_s": tracker.wall_s})
    if verdict is not None and not verdict.released:
        raise Refused(config.model, verdict.refusals)


def read_reward_text(model: str, key: str, scorer: ScorerSettings, card: RewardModelCard | None) -> RewardText:
    """See that a directory is a reward model, and how it is given text.

    Raises:
        BadInput: it is none.
    """
    facts = read_model_facts(model, key)
    tokenizer = templated_tokenizer(model, card, key)
    check_tokenizer_fits(tokenizer, facts, model, key)
    check_reward_model(facts, card, model, key)
    limit = scorer.max_length or (card.max_length if card else min(facts.context_tokens, tokenizer.model_max_length))
    return RewardText(tokenizer, RewardEncoding.for_model(tokenizer, card, limit), scorer.on_too_long)


def _leakage(config: RewardEvaluationConfig, used: UsedPairs, text: RewardText) -> Leakage | None:
    training = TrainingTexts.load(config.model, "model")
    if config.training_pairs is not None:
        read = read_pairs(config.training_pairs, "training_pairs.path", text.tokenizer, text.encoding, "truncate")
        training = TrainingTexts.of(hash_pairs(read.pairs))
    return None if training is None else training.leakage(hash_pairs(used.pairs))


def _read_samples(settings: BestOfNSettings | None) -> PolicySamples | None:
    if settings is None or settings.path is None:
        return None
    return load_samples(settings.path, "best_of_n.path", judged=settings.judge == "samples")


def _score_benchmark(
    scorers: ActorGroup[RewardScorer], benchmark: Benchmark, text: RewardText, tracker: Tracker
) -> BenchmarkResult:
    tracker.phase(f"scoring {benchmark.name}")
    templated = text.tokenizer.chat_template is not None
    tokens = [text.tokens(item_text(item, text.tokenizer), templated) for item in benchmark.items]
    return score_benchmark(benchmark, _scores_of(scorers, tokens))


def _scores_of(scorers: ActorGroup[RewardScorer], tokens: Sequence[tuple[int, ...] | None]) -> NDArray[np.float64]:
    """`[n]`, NaN where there is no score; equal texts are scored once."""
    unique = list(dict.fromkeys(ids for ids in tokens if ids is not None))
    scores = score_all(scorers, unique).scores.tolist() if unique else []
    score_of = dict(zip(unique, scores, strict=True))
    return np.array([math.nan if ids is None else score_of[ids] for ids in tokens])


def _best_of_n(
    config: RewardEvaluationConfig, samples: PolicySamples, scorers: ActorGroup[RewardScorer], text: RewardText
) -> BestOfNReport:
    """Ranked by the reward model, judged by the second judge (for which a reward model takes its place for a while)."""
    settings = config.best_of_n
    assert settings is not None, "called with the section only"
    proxy = score_samples(samples, text.tokenizer, _text_scorer(scorers, text))
    judge_text, judge_scorer = None, None
    if settings.judge not in JUDGES_WITHOUT_MODEL:
        card = RewardModelCard.load(settings.judge, "best_of_n.judge")
        judge_text = read_reward_text(settings.judge, "best_of_n.judge", config.scorer, card)
        build_scorers(scorers, settings.judge, config.scorer)
        judge_scorer = _text_scorer(scorers, judge_text)
    gold = judge_samples(samples, settings.judge, judge_text.tokenizer if judge_text else None, judge_scorer)
    return report_best_of_n(proxy, gold, settings.judge, truncated_share=samples.truncated_share)


def _text_scorer(scorers: ActorGroup[RewardScorer], text: RewardText) -> TextScorer:
    def score(texts: Sequence[str], templated: bool) -> NDArray[np.float64]:
        return _scores_of(scorers, [text.tokens(each, templated) for each in texts])

    return score
