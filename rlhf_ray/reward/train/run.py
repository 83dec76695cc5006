"""Training a reward model on human comparisons: read, look at the data, train, write, judge, release or refuse."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_ray.config.reward_model import AggregationSettings, RewardModelConfig
from rlhf_ray.failures import Finished, Refused
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.ensemble import fit_member_scale
from rlhf_ray.reward.core.reference_scores import ReferenceScores
from rlhf_ray.reward.core.scorer import RewardScorer, ScoredTexts
from rlhf_ray.reward.judge import data_report
from rlhf_ray.reward.judge.bias import overpayment
from rlhf_ray.reward.judge.evaluation import PairEvaluation
from rlhf_ray.reward.judge.gate import Verdict
from rlhf_ray.reward.judge.groups import Groups
from rlhf_ray.reward.judge.inputs import TrainingInputs, UsedPairs, layout_of, read_training_inputs
from rlhf_ray.reward.judge.judging import (
    Judged,
    build_scorers,
    check_vllm,
    conclude,
    integrity_requests,
    judge_pairs,
    scorer_request,
)
from rlhf_ray.reward.judge.leakage import TrainingTexts, hash_pairs
from rlhf_ray.reward.judge.report import headline
from rlhf_ray.reward.judge.scoring import score_all
from rlhf_ray.reward.train.loop import RewardTraining, TrainedMembers, steps_per_member
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import connected, role_group
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.report import plot_loss
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic
from rlhf_ray.tracking.tracker import Tracker, check_folder, take_up_copy

COLUMNS = (
    Column("loss", "loss", ".4f", curve=True, better="lower"),
    Column("accuracy", "accuracy", ".3f", better="higher"),
    Column("margin/mean", "margin", "+.3f"),
    Column("throughput/pairs_per_s", "pairs/s", ".1f"),
    Column("time/step_s", "s/step", ".1f"),
)
_SCALE_TEXTS = 2000
"""Training texts that members' scales and the length penalty are fitted on."""


def run_reward_model(config: RewardModelConfig, resume: bool = False) -> None:
    """Everything `rlhf-ray train-rm` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a rank failed, died or did not answer.
        Stopped: by SIGTERM or SIGINT; there is a checkpoint of the last step.
        Refused: the model is written, and the release gate refused it.
    """
    try:
        check_folder(config, resume)
        take_up_copy(config, resume)
    except Finished as finished:
        _refuse_again(RunFolder(Path(finished.folder)))
        raise
    if config.gate.enabled and config.held_out is not None:
        check_vllm(config.gate)
    inputs = read_training_inputs(config)
    layout = layout_of(inputs.attributes, config.ensemble)
    steps = steps_per_member(config, len(inputs.training.pairs)) * len(layout.folders)
    learner = RoleRequest("reward-learner", "learner", config.learner)
    phases = [[learner], [scorer_request(config.scorer)], integrity_requests(config.scorer, config.gate)]
    with connected(config.cluster, phases):
        title = f"reward model {config.run.name} · {config.model}"
        with Run(config, "reward_model", title, steps, COLUMNS, config.checkpoint, resume) as run:
            report = _look_at_the_data(inputs, run.folder, run.tracker)
            with role_group(learner, config.cluster, run.tracker) as group:
                trained = RewardTraining(config, inputs, layout, group, run).train()
            _finish(config, inputs, layout, trained, report, run.folder, run.tracker)


def _refuse_again(folder: RunFolder) -> None:
    """A model that was refused stays refused, however often its run is resumed.

    Raises:
        Refused: it was.
    """
    model = str(folder.reward_model)
    card = RewardModelCard.load(model, "paths.runs")
    if card is not None and card.released is False:
        raise Refused(model, card.refusals)


def _look_at_the_data(inputs: TrainingInputs, folder: RunFolder, tracker: Tracker) -> data_report.DataReport:
    """The report on the data comes first: on the terminal in short, in `data.json` in full."""
    held_out = inputs.held_out
    report = data_report.report_data(
        inputs.training.preferences,
        held_out.preferences if held_out else None,
        inputs.validation.preferences if inputs.validation else None,
        training_tokens=inputs.training.num_tokens,
        held_out_tokens=held_out.num_tokens if held_out else None,
        training_left_out=inputs.training.left_out,
        held_out_left_out=held_out.left_out if held_out else data_report.LeftOut(),
    )
    write_atomic(folder.path / "data.json", json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    for line in data_report.lines(report):
        tracker.display.message(line)
    for name, used in (("pairs", inputs.training), ("validation", inputs.validation), ("held_out", held_out)):
        if used is None:
            continue
        read = used.preferences
        tracker.events.write(
            "data_read", data=name, pairs=len(used.pairs), bad_rows=read.num_skipped, left_out=asdict(used.left_out)
        )
        for message in read.bad_rows.messages:
            tracker.display.message(f"left out: {message}")
        if read.num_skipped > len(read.bad_rows.messages):
            tracker.display.message(f"left out: {read.num_skipped} rows of {name} in all")
    for finding in data_report.data_findings(report):
        tracker.display.message(f"warning: {finding.line} → {finding.lever}")
    return report


def _finish(
    config: RewardModelConfig,
    inputs: TrainingInputs,
    layout: MemberLayout,
    trained: TrainedMembers,
    data: data_report.DataReport,
    folder: RunFolder,
    tracker: Tracker,
) -> None:
    """From weights to a reward model with its card, judged, and released or refused."""
    model = str(folder.reward_model)
    seen = [used for used in (inputs.training, inputs.validation) if used is not None]
    TrainingTexts.of(*(hash_pairs(used.pairs) for used in seen)).save(folder.reward_model)
    weights = tuple(config.aggregation.attributes.get(name, 0.0) for name in layout.attributes)
    card = RewardModelCard(
        version="",
        base_model=config.model,
        max_length=inputs.encoding.max_length,
        append_eos=inputs.encoding.append_eos,
        chat_template=inputs.encoding.tokenizer.chat_template,
        training_data=inputs.training.digest(),
        layout=layout,
        aggregation=ScoreAggregation(
            members=config.aggregation.members,
            variance_weight=config.aggregation.variance_weight,
            attribute_weights=weights,
        ),
        head_hashes=trained.head_hashes,
        probes=trained.probes,
        covers_tokenizer=True,
    )
    card = _write(card, folder)
    plot_loss(folder.metrics, folder.plot, f"{config.run.name} · {config.model}")
    summary: dict[str, object] = {
        "name": config.run.name,
        "steps": trained.steps,
        "pairs": len(inputs.training.pairs),
    }
    verdict: Verdict | None = None
    judged: Judged | None = None
    with role_group(scorer_request(config.scorer), config.cluster, tracker) as scorers:
        tracker.phase("loading the reward model again")
        build_scorers(scorers, model, config.scorer)
        fitted, sample = _fit_aggregation(card, config.aggregation, scorers, inputs.training)
        card = _write(card.model_copy(update={"aggregation": fitted}), folder)
        if inputs.held_out is not None:
            tracker.phase("judging the reward model")
            try:
                judged = judge_pairs(scorers, inputs.held_out, model, card, config)
            except Refused as refusal:
                _record(Verdict(False, refusal.refusals), card, folder)
                raise
    # Training texts stand in for held-out ones; a model has learnt to tell them apart, so their scores lie wider.
    scores, lengths = fitted.scores(sample.heads, sample.num_tokens)[0], sample.num_tokens
    if judged is not None:
        scores, lengths = judged.scored.text_scores, judged.scored.text_lengths
    if np.isfinite(scores).any():
        ReferenceScores.of(scores, lengths, card.version).save(folder.reward_model)
    if judged is not None:
        card = _write(with_figures(card, judged.evaluation), folder)
        record = partial(_record, card=card, folder=folder)
        gate, judged = config.gate.enabled, replace(judged, card=card)
        verdict = conclude(config, judged, tracker, record, gate=gate, leakage=data.leakage, data=data).verdict
        summary["reward_model"] = card.evaluation
        summary["released"] = None if verdict is None else verdict.released
    tracker.finish(summary | {"version": card.version, "wall_s": tracker.wall_s})
    if verdict is not None and not verdict.released:
        raise Refused(model, verdict.refusals)


def _record(verdict: Verdict, card: RewardModelCard, folder: RunFolder) -> None:
    """The verdict, into the card."""
    _write(card.model_copy(update={"released": verdict.released, "refusals": verdict.refusals}), folder)


def _write(card: RewardModelCard, folder: RunFolder) -> RewardModelCard:
    """Write a card under the version that the weights have with it."""
    card = card.model_copy(update={"version": card.version_of(folder.reward_model)})
    card.save(folder.reward_model)
    return card


def with_figures(card: RewardModelCard, evaluation: PairEvaluation) -> RewardModelCard:
    """What was found of a model, in its card."""
    figures = {"temperature": evaluation.temperature.stored, "evaluation": headline(evaluation)}
    return card.model_copy(update=figures)


def _fit_aggregation(
    card: RewardModelCard,
    settings: AggregationSettings,
    scorers: ActorGroup[RewardScorer],
    training: UsedPairs,
) -> tuple[ScoreAggregation, ScoredTexts]:
    """Scales of the members and the length penalty, from training pairs, and the scored texts of those.

    Raises:
        Refused: a member gives all texts the same score, or no pair has scores.
    """
    aggregation = card.aggregation
    penalty = settings.length_penalty
    if isinstance(penalty, float):
        aggregation = aggregation.model_copy(update={"length_coefficient": penalty})
    texts_a_pair = 2
    stride = max(texts_a_pair * len(training.pairs) // _SCALE_TEXTS, 1)
    rows = range(0, len(training.pairs), stride)
    texts = [side[row] for side in (training.chosen, training.rejected) for row in rows]
    scored = score_all(scorers, texts)
    whole = np.flatnonzero(np.isfinite(scored.heads).all(axis=(1, 2)).reshape(2, -1).all(axis=0))
    if not len(whole):
        raise Refused(card.base_model, ("failures: Not one of the training pairs has scores for both texts.",))
    sides = np.concatenate([whole, whole + len(rows)])
    heads, num_tokens, pairs = scored.heads[sides], scored.num_tokens[sides], [training.pairs[rows[at]] for at in whole]
    chosen, rejected = aggregation.member_scores(heads).reshape(2, len(whole), -1)
    if chosen.shape[1] > 1:
        try:
            scale = fit_member_scale(chosen, rejected)
        except ValueError as error:
            raise Refused(card.base_model, (f"ensemble: {error}; there is nothing to aggregate",)) from None
        aggregation = aggregation.model_copy(update={"offsets": scale.offset, "scales": scale.scale})
    if penalty == "fitted":
        scores, _ = aggregation.scores(heads, num_tokens, np.tile(whole, 2))
        score_differences, length_differences = (
            np.subtract(*values.reshape(2, len(whole))) for values in (scores, num_tokens)
        )
        labels = [pair.chosen_probability for pair in pairs]
        found = overpayment(score_differences, length_differences, labels, Groups.of(pairs))
        aggregation = aggregation.model_copy(update={"length_coefficient": found.penalty})
    return aggregation, scored
