"""Live traffic against the reference: how often it alarms without cause, and whether it does with one."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import ks_2samp

from rlhf_ray.config.serving import DriftSettings
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.reference_scores import Distribution, ReferenceScores
from rlhf_ray.reward.serve.drift import DriftWatch, compare

Texts = tuple[np.ndarray, np.ndarray]


def draw(generator: np.random.Generator, count: int, shift: float = 0.0, scale: float = 1.0) -> Texts:
    """Scores, and lengths of texts of which some are cut at 60 tokens."""
    lengths = np.minimum(np.rint(scale * generator.lognormal(3.2, 0.6, count)), 60.0)
    return generator.standard_t(5, count) + shift, lengths


def reference_of(count: int = 2000, key: int = 0) -> ReferenceScores:
    return ReferenceScores.of(*draw(keyed_generator(0, "reference", key), count), "v")


def test_false_alarms_are_as_rare_as_they_may_be():
    # Each reference is drawn too, as in training; 4,000 windows. 3.1 standard errors are allowed above the rate.
    rate, windows = 0.02, 4000
    alarms = np.zeros(2)
    for number in range(windows // 10):
        reference = reference_of(1000, number)
        watch = DriftWatch(reference, DriftSettings(window_texts=500, false_alarm_rate=rate))
        for found in watch.add(*draw(keyed_generator(0, "live", number), 5000)):
            alarms += [found.score.alarm, found.length.alarm]
        assert watch.windows == 10
    allowed = rate / 2 * windows + 3.1 * (rate / 2 * windows) ** 0.5
    assert alarms.sum() <= rate * windows + 3.1 * (rate * windows) ** 0.5
    assert (alarms <= allowed).all()
    assert alarms.min() > 0


@pytest.mark.parametrize(("quantity", "change"), [("score", {"shift": 0.39}), ("length", {"scale": 1.2})])
def test_a_shift_of_three_tenths_of_a_standard_deviation_is_seen(quantity: str, change: dict[str, float]):
    # Student's t with 5 degrees of freedom has a standard deviation of 1.29.
    watch = DriftWatch(reference_of(), DriftSettings(window_texts=2000, false_alarm_rate=0.001))
    generator = keyed_generator(0, "moved", quantity)
    found = [watch.add(*draw(generator, 2000, **change))[0] for _ in range(200)]
    own = [{"score": drift.score, "length": drift.length}[quantity] for drift in found]
    assert sum(each.alarm for each in own) > 198
    assert own[0].mean > own[0].reference_mean


def test_the_distance_is_that_of_two_samples_without_ties_but_for_the_points_left_out():
    generator = keyed_generator(0, "ks")
    ours, theirs = generator.normal(0.2, 1, 700), generator.normal(0, 1, 900)
    found = compare(ours, Distribution.of(theirs), 900, 0.01)
    exact = ks_2samp(ours, theirs, method="asymp")
    assert exact.statistic - 1 / 200 <= found.ks <= exact.statistic
    assert found.p_value >= exact.pvalue
    assert found.p_value == pytest.approx(exact.pvalue, rel=0.5)


@pytest.mark.parametrize("live", [3.0, 5.0])
def test_a_reference_of_one_value_knows_other_values(live: float):
    found = compare(np.full(500, live), Distribution.of(np.full(500, 4.0)), 500, 0.01)
    assert (found.ks, found.alarm) == (1.0, True)
    assert not compare(np.full(500, 4.0), Distribution.of(np.full(500, 4.0)), 500, 0.01).alarm


def test_texts_cut_where_others_ended_just_before_are_told_apart():
    generator = keyed_generator(0, "cut")
    reference = np.where(generator.random(1000) < 0.5, 512.0, generator.integers(10, 400, 1000))
    live = np.where(reference == 512, 505.0, reference)
    found = compare(live, Distribution.of(reference), 1000, 0.001)
    assert found.ks == pytest.approx(np.mean(reference == 512))
    assert found.alarm


def test_windows_are_disjoint_however_the_texts_arrive():
    settings = DriftSettings(window_texts=300, min_texts=100)
    scores, lengths = draw(keyed_generator(0, "order"), 1000)
    whole = DriftWatch(reference_of(), settings)
    expected = whole.add(scores, lengths)
    parts = DriftWatch(reference_of(), settings)
    found = [parts.add(scores[start : start + 7], lengths[start : start + 7]) for start in range(0, 1000, 7)]
    assert tuple(drift for each in found for drift in each) == expected
    assert (len(expected), whole.windows, parts.windows) == (3, 3, 3)
    compared = partial(compare, reference=reference_of().score, reference_texts=2000, false_alarm_rate=0.0005)
    assert [drift.score for drift in expected] == [compared(scores[i : i + 300]) for i in (0, 300, 600)]
    # What is looked at rolls on over the end of a window.
    rolling = parts.rolling()
    assert rolling is not None
    assert rolling.score.ks == compared(scores[700:]).ks
    assert parts.latest == whole.latest == expected[-1]


def test_a_text_counts_once_in_a_window():
    settings = DriftSettings(window_texts=300, min_texts=100)
    scores, lengths = draw(keyed_generator(0, "repeats"), 900)
    cycled = np.arange(5000) % 90
    watch = DriftWatch(reference_of(), settings)
    assert watch.add(scores[cycled], lengths[cycled], cycled) == ()
    assert watch.rolling() is None
    assert watch.repeated_texts == 4910
    # Texts seen in one window count again in the next.
    twice = np.repeat(np.arange(300), 2)
    watch = DriftWatch(reference_of(), settings)
    once = DriftWatch(reference_of(), settings).add(scores[:300], lengths[:300])
    assert watch.add(scores[twice], lengths[twice], twice) == once
    assert [drift.score.ks for drift in watch.add(scores[:300], lengths[:300], np.arange(300))] == [once[0].score.ks]
    assert (watch.windows, watch.repeated_texts) == (2, 299)


def test_texts_without_a_score_are_left_out_and_alarms_counted():
    watch = DriftWatch(reference_of(), DriftSettings(window_texts=200, min_texts=50))
    scores, lengths = draw(keyed_generator(0, "failed"), 1000, shift=2.0)
    scores[::2] = np.nan
    assert all(drift.alarm and drift.score.alarm for drift in watch.add(scores, lengths))
    assert (watch.windows, watch.alarms, watch.failed_texts) == (2, 2, 500)
