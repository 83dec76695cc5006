"""The whole judgement on models of which everything is known; `bench/judgement.py` has more of them."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from rlhf_ray.config.reward_model import GateSettings, JudgementSettings
from rlhf_ray.reward.judge.evaluation import PairEvaluation, PairScores, evaluate_pairs
from rlhf_ray.reward.judge.gate import GateFigures, judge
from tests.synthetic import (
    Judged,
    Model,
    Responses,
    flipped,
    in_units_of,
    judged,
    length_only,
    partly_blind,
    paying_for,
    perfect,
    preference_pair,
    uneven,
    unsure,
)

SEEDS = 20
PROMPTS = 100  # six pairs each


@cache
def many(model: Model, votes: int = 1, spread: float = 2.0, seeds: int = SEEDS) -> tuple[Judged, ...]:
    return tuple(judged(Responses.draw(seed, PROMPTS, votes=votes, spread=spread), model) for seed in range(seeds))


@pytest.mark.parametrize("votes", [1, 16])
@pytest.mark.parametrize("model", [perfect, unsure, partly_blind, in_units_of(0.005), in_units_of(250)])
def test_sound_models_are_released(model: Model, votes: int):
    """Though length goes with quality: the correlation given the preference is 0.37, beyond what was allowed once."""
    refusals = [each.verdict.refusals for each in many(model, votes)]
    assert sum(bool(each) for each in refusals) <= SEEDS * 0.05, refusals


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (flipped, "accuracy: "),
        (length_only, "length: Between responses of the same length"),
        (paying_for("lengths", 0.6), "length: "),
        (uneven(4.0), "calibration: "),
    ],
    ids=["flipped", "length-only", "overpaid-length", "miscalibrated"],
)
def test_faulty_models_are_refused(model: Model, reason: str):
    for each in many(model, seeds=10):
        assert any(line.startswith(reason) for line in each.verdict.refusals), each.verdict.refusals


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_model_that_is_nearly_always_right_is_calibrated_by_being_sure(wrong: int):
    random = np.random.default_rng(wrong)
    delta = random.uniform(0.5, 2, 600) * np.where(np.arange(600) < wrong, -1, 1)
    pairs = [preference_pair(f"prompt {number}", f"a {number}", f"b {number}") for number in range(600)]
    found = evaluate_pairs(pairs, scores_of(delta), ("preference",), JudgementSettings(), seed=wrong)
    assert judge(GateFigures.of(found, 600, None), (), GateSettings()).refusals == ()


def test_prompts_are_counted_where_there_is_a_preference():
    same = [preference_pair("same", f"a {number}", f"b {number}") for number in range(300)]
    ties = [preference_pair(f"tie {number}", f"c {number}", f"d {number}", 0.5) for number in range(20)]
    blank = [preference_pair(" ", f"e {number}", f"f {number}") for number in range(3)]
    for pairs, prompts in ((same, 1), ([*same, *ties], 1), ([*same, *ties, *blank], 4)):
        scores = scores_of(np.linspace(0.1, 2, len(pairs)))
        found = evaluate_pairs(pairs, scores, ("preference",), JudgementSettings(), seed=0)
        assert found.prompts == prompts


def test_every_figure_knows_which_pairs_are_related():
    """Each pair ten times under its prompt is no more evidence than once."""
    random = np.random.default_rng(0)
    delta, gaps = random.normal(1, 1, 60), random.integers(-3, 4, 60)
    first = random.random(60) < 0.5

    def evaluated(times: int) -> PairEvaluation:
        pairs = [
            replace(
                preference_pair(f"prompt {number}", f"a {number} {again}" + "!" * (number % 3), f"b {number} {again}"),
                chosen_is_first=bool(first[number]),
            )
            for number in range(60)
            for again in range(times)
        ]
        scores = scores_of(np.repeat(delta, times), np.repeat(gaps, times), members=3)
        return evaluate_pairs(pairs, scores, ("preference",), JudgementSettings(bins=1), seed=0)

    once, often = evaluated(1), evaluated(10)

    def widths(found: PairEvaluation) -> list[float]:
        marks = next(each for each in found.formats if each.name == "exclamation marks")
        assert found.position is not None
        assert found.disagreement is not None
        estimates = (found.accuracy, found.position, found.length.overpayment.score, marks.overpayment.score)
        return [
            *(each.high - each.low for each in (*estimates, found.disagreement.auroc, found.by_attribute[0].accuracy)),
            found.calibration.floor.mean,
        ]

    assert widths(often) == pytest.approx(widths(once), rel=0.3)


def scores_of(delta: np.ndarray, longer: np.ndarray | int = 0, members: int = 1) -> PairScores:
    """Of pairs whose chosen response scores higher by `delta`, and is longer by so many tokens."""
    sides = np.stack([delta, np.zeros(len(delta))], axis=1)
    spread = 1 + np.arange(members) * np.cos(7 * delta)[:, None] / 10
    return PairScores(
        chosen=sides[:, 0],
        rejected=sides[:, 1],
        chosen_attributes=sides[:, :1],
        rejected_attributes=sides[:, 1:],
        member_differences=delta[:, None] * spread,
        num_tokens=np.stack([20 + longer + np.zeros(len(delta)), np.full(len(delta), 20)], axis=1).astype(np.int64),
    )


def test_leaked_pairs_are_refused():
    found = judged(Responses.draw(0, PROMPTS), perfect, leaked=0.01)
    assert [line.split(":")[0] for line in found.verdict.refusals] == ["leakage"]


@pytest.mark.parametrize("votes", [1, 16])
def test_a_perfect_model_is_said_to_be_one(votes: int):
    found = [each.evaluation for each in many(perfect, votes)]
    assert np.mean([each.temperature.temperature for each in found]) == pytest.approx(1, abs=0.06)
    assert np.mean([each.calibration.excess.value for each in found]) == pytest.approx(0, abs=0.005)
    assert np.mean([each.length.overpayment.share.value for each in found]) == pytest.approx(0, abs=0.05)
    shares = [each.length.overpayment.share for each in found]
    held = [share.low <= 0 <= share.high for share in shares]
    assert np.mean(held) >= 0.85
    if votes > 1:
        ceilings = np.array([each.ceiling.accuracy for each in found])
        reached = np.array([each.vote_accuracy for each in found])
        assert ceilings.mean() == pytest.approx(0.778, abs=0.01)
        assert np.abs(reached - ceilings).max() < 0.02


def test_formats_that_are_paid_for_are_found_and_others_are_not():
    found = [each.evaluation for each in many(paying_for("marks", 0.4), seeds=5)]
    for evaluation in found:
        sure = [each.name for each in evaluation.formats if (each.overpayment.share.low or 0.0) > 0.1]
        assert sure == ["exclamation marks"]
        assert evaluation.length.overpayment.share.value < 0.1


def test_fewer_pairs_than_can_show_anything_are_refused():
    refusals = judged(Responses.draw(0, 20, votes=16), perfect).verdict.refusals
    assert any(line.startswith("evidence: ") for line in refusals)
