"""The whole judgement on models of which everything is known; `bench/judgement.py` has more of them."""

from functools import cache

import numpy as np
import pytest

from tests.synthetic import (
    Judged,
    Model,
    Responses,
    flipped,
    judged,
    length_only,
    partly_blind,
    paying_for,
    perfect,
    uneven,
    unsure,
)

SEEDS = 20
PROMPTS = 100  # six pairs each


@cache
def many(model: Model, votes: int = 1, spread: float = 2.0, seeds: int = SEEDS) -> tuple[Judged, ...]:
    return tuple(judged(Responses.draw(seed, PROMPTS, votes=votes, spread=spread), model) for seed in range(seeds))


@pytest.mark.parametrize("votes", [1, 16])
@pytest.mark.parametrize("model", [perfect, unsure, partly_blind])
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
