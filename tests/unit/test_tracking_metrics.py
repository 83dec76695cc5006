import math

import pytest

from rlhf_ray.tracking.metrics import METRICS, PHASE_COLORS, PPO_METRICS, check_known, phase_times


@pytest.mark.parametrize("kind", METRICS)
def test_each_metric_is_there_once_and_explained(kind):
    names = [metric.name for metric in METRICS[kind]]
    assert len(names) == len(set(names))
    assert all(len(metric.meaning.split()) >= 5 and metric.meaning.endswith((".", "`.")) for metric in METRICS[kind])


def test_a_metric_without_a_meaning_is_refused_with_the_nearest_name():
    check_known("ppo", ["reward/mean", "time/step_s"])
    with pytest.raises(ValueError, match=r"unknown metric 'reward/meen' of a ppo run; did you mean 'reward/mean'\?"):
        check_known("ppo", ["reward/mean", "reward/meen"])
    with pytest.raises(ValueError, match="reward/mean"):
        check_known("sft", ["reward/mean"])


def test_a_name_from_the_configuration_stands_where_the_registry_has_a_placeholder():
    check_known("ppo", ["reward/helpful/mean", "reward/exact_match/failed_fraction"])
    for name in ("reward/helpful/median", "reward/a/b/mean", "reward//mean"):
        with pytest.raises(ValueError, match="unknown metric"):
            check_known("ppo", [name])


def test_every_timed_phase_has_a_colour():
    timed = {metric.name for metric in PPO_METRICS if metric.name.startswith("time/")} - {"time/step_s"}
    assert {f"time/{phase.replace(' ', '_')}_s" for phase in PHASE_COLORS if phase != "other"} == timed


def test_phases_add_up_to_the_step():
    row = {
        "time/step_s": 10.0,
        "time/train_s": 5.0,
        "time/generate_s": 3.0,
        "time/sync_s": None,
        "time/values_s": math.nan,
    }
    assert phase_times(row) == {"generate": 3.0, "train": 5.0, "other": 2.0}
    assert list(phase_times(row)) == ["generate", "train", "other"]
    assert phase_times({"time/step_s": 4.0, "time/train_s": 5.0}) == {"train": 5.0}
    assert phase_times({"time/step_s": 4.0}) == {}
