"""Candidates beside the live model, and the rules that take them back."""

import json
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_ray.config.serving import CandidateSettings
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.serve.candidates import CanaryComparison, ShadowComparison, judge, sign_flips, sign_flips_within
from rlhf_ray.reward.serve.traffic import ModelWork, Pace

SETTINGS = CandidateSettings(min_texts=200)
ALONE = np.arange(100_000, dtype=np.uint64)


def normal(count: int, *key: str | int) -> np.ndarray:
    return keyed_generator(0, *key).normal(size=count)


def shadow(live: np.ndarray, other: np.ndarray, groups: np.ndarray | None = None) -> ShadowComparison:
    comparison = ShadowComparison()
    comparison.add(live, other, ALONE[: len(live)] if groups is None else groups)
    return comparison


def credit(live: np.ndarray, other: np.ndarray, first: int, second: int) -> float | None:
    """Brute force: what one pair counts."""
    signs = [np.sign(scores[first] - scores[second]) for scores in (live, other)]
    return None if signs == [0, 0] else float(abs(signs[0] - signs[1]) / 2)


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_sign_flips_against_all_pairs(levels: int):
    generator = keyed_generator(0, "pairs", levels)
    live, other = generator.integers(0, levels, (2, 60)).astype(float)
    groups = generator.integers(0, 15, 60).astype(np.uint64)
    everywhere = [credit(live, other, i, j) for i, j in combinations(range(60), 2)]
    inside = [credit(live, other, i, j) for i, j in combinations(range(60), 2) if groups[i] == groups[j]]
    for found, credits in ((sign_flips(live, other), everywhere), (sign_flips_within(live, other, groups), inside)):
        counted = [each for each in credits if each is not None]
        assert found is not None
        assert (found.rate, found.pairs) == (pytest.approx(np.mean(counted)), len(counted))
        assert 0 <= found.low < found.rate < found.high <= 1


def test_pairs_of_independent_requests_have_wilsons_interval():
    groups = np.repeat(np.arange(1000, dtype=np.uint64), 2)
    live, other = normal(2000, "live"), normal(2000, "other")
    found = sign_flips_within(live, live + 0.8 * other, groups)
    assert found is not None
    wilson = binomtest(round(found.rate * 1000), 1000).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(wilson.low, abs=1e-3), pytest.approx(wilson.high, abs=1e-3))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Requests of five texts; half of the requests are flipped altogether, so their ten pairs are one piece of evidence.
    groups, repeats, inside = np.repeat(np.arange(60, dtype=np.uint64), 5), 400, 0
    for number in range(repeats):
        generator = keyed_generator(0, "coverage", number)
        live, flipped = generator.normal(size=300), generator.random(60) < 0.3
        found = sign_flips_within(live, np.where(np.repeat(flipped, 5), -live, live), groups)
        assert found is not None
        inside += found.low <= 0.3 <= found.high
    assert abs(inside / repeats - 0.95) < 3.1 * (0.95 * 0.05 / repeats) ** 0.5


def test_the_interval_over_all_pairs_holds_the_truth():
    inside = 0
    for number in range(200):
        found = sign_flips(normal(100, "live", number), normal(100, "other", number))
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert inside >= 0.95 * 200


@pytest.mark.parametrize("group_size", [1, 4])
def test_an_unrelated_shadow(group_size: int):
    groups = np.arange(2000, dtype=np.uint64) // group_size
    scores = shadow(normal(2000, "live"), normal(2000, "other"), groups).report().scores
    assert scores.sign_flips_within_requests == (group_size > 1)
    assert scores.sign_flip_rate == pytest.approx(0.5, abs=0.04)
    assert scores.kendall_tau == pytest.approx(0.0, abs=0.05)


def test_the_same_scores():
    live = normal(500, "live")
    report = shadow(live, live, ALONE[:500] // 2).report()
    scores = report.scores
    assert (scores.sign_flip_rate, scores.sign_flip_low) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert 0 < scores.sign_flip_high < 0.03
    assert scores.sign_flip_pairs == 250
    assert scores.kendall_tau == pytest.approx(1.0)
    assert scores.score_shift == 0.0
    assert judge(shadow(live, live), SETTINGS) == ()


def test_the_same_order_on_another_scale():
    live = normal(500, "live")
    scores = shadow(live, 2 * live + 3 * live.std()).report().scores
    assert (scores.sign_flip_rate, scores.kendall_tau) == (0.0, pytest.approx(1.0))
    assert scores.score_shift == pytest.approx(3 + live.mean() / live.std())
    assert shadow(live, np.exp(live)).report().scores.kendall_tau == pytest.approx(1.0)
    assert shadow(live, -live).report().scores.sign_flip_rate == 1.0


def test_a_shadow_that_scores_everything_alike_is_no_better_than_chance():
    comparison = shadow(normal(500, "live"), np.full(500, 0.1))
    scores = comparison.report().scores
    assert (scores.sign_flip_rate, scores.kendall_tau) == (0.5, None)
    assert [reason.split(":")[0] for reason in judge(comparison, SETTINGS)] == ["sign flips"]
    nothing = shadow(np.full(50, 0.1), np.full(50, 0.1)).report().scores
    assert (nothing.sign_flip_rate, nothing.score_shift) == (None, None)


def test_a_few_pairs_inside_requests_do_not_stand_for_all():
    live = normal(600, "live")
    groups = ALONE[:600].copy()
    groups[1] = groups[0]
    other = live.copy()
    other[[0, 1]] = live[[1, 0]]
    comparison = shadow(live, other, groups)
    scores = comparison.report().scores
    assert not scores.sign_flips_within_requests
    assert scores.sign_flip_rate < 0.01
    assert judge(comparison, SETTINGS) == ()
    flips = sign_flips_within(live, other, groups)
    assert flips is not None
    assert (flips.rate, flips.low, flips.high, flips.pairs) == (1.0, 0.0, 1.0, 1)


def test_only_the_latest_texts_are_compared_and_all_are_counted():
    comparison = ShadowComparison(window_texts=100)
    comparison.add(normal(400, "old"), normal(400, "other"), ALONE[:400])
    live = normal(110, "new")
    live[:10] = np.nan
    comparison.add(live, live, ALONE[400:510])
    report = comparison.report()
    assert report.texts == 500
    assert (report.scores.sign_flip_rate, report.scores.sign_flip_pairs) == (0.0, 100 * 99 // 2)


def test_nothing_is_said_before_enough_texts():
    live = normal(199, "live")
    comparison = shadow(live, -live + 100)
    comparison.add_work(ModelWork(texts=199), ModelWork(texts=199, failures=199), Pace(100.0, 1.0, 199))
    assert judge(comparison, SETTINGS) == ()
    assert judge(ShadowComparison(), SETTINGS) == judge(CanaryComparison(), SETTINGS) == ()
    more = CandidateSettings(min_texts=199)
    assert [reason.split(":")[0] for reason in judge(comparison, more)] == [
        "failures",
        "latency",
        "score shift",
        "sign flips",
        "rank correlation",
    ]


def test_a_shadow_that_fails_at_every_text_is_taken_back():
    comparison = shadow(normal(300, "live"), np.full(300, np.nan))
    comparison.add_work(ModelWork(texts=300), ModelWork(texts=300, failures=300))
    assert comparison.report().texts == 0
    (reason,) = judge(comparison, SETTINGS)
    assert reason == (
        "failures: 100.0% of 300 texts have no score, with the live model 0.0%; candidates.max_failure_rate allows "
        "1.0% more"
    )


def work_of(scores: np.ndarray, failures: int) -> ModelWork:
    return ModelWork(len(scores) + failures, 1, failures, 1.0, float(scores.sum()), float((scores**2).sum()))


def test_a_canary_is_compared_by_counts():
    live, canary = normal(5000, "live") + 1, normal(400, "canary") + 2
    comparison = CanaryComparison()
    for part in (live[:2000], live[2000:]):
        comparison.add_work(work_of(part, 50), ModelWork(), Pace(1.0, 0.4, 100))
    comparison.add_work(ModelWork(), work_of(canary, 10))
    report = comparison.report()
    assert (report.texts, report.work.candidate_texts, report.work.live_texts) == (400, 410, 5100)
    assert report.scores.score_shift == pytest.approx((canary.mean() - live.mean()) / live.std())
    assert report.work.latency_ratio == pytest.approx(2.5)
    assert report.scores.sign_flip_rate is None
    # 10 of 410 texts fail, 100 of 5100 with the live model: half a per cent more.
    assert judge(comparison, SETTINGS) == ()
    assert len(judge(comparison, CandidateSettings(min_texts=200, max_failure_rate=0.004))) == 1
    assert "2.50 times" in judge(comparison, CandidateSettings(min_texts=200, max_latency_ratio=2.0))[0]


def test_a_canary_without_any_spread_has_no_shift():
    comparison = CanaryComparison()
    comparison.add_work(work_of(np.full(300, 0.1), 0), work_of(np.full(300, 5.0), 0))
    assert comparison.report().scores.score_shift is None


def test_a_report_is_one_flat_json_object():
    for comparison in (shadow(normal(50, "live"), normal(50, "other")), ShadowComparison(), CanaryComparison()):
        found = comparison.report().as_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        shown = {"texts", "sign_flip_rate", "kendall_tau", "score_shift", "latency_ratio", "failure_rate"}
        assert shown <= found.keys()
