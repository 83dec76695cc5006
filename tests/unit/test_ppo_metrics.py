"""What the driver makes of the learners' reports and the headers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.algorithms.experience import ExperienceStats
from rlhf_ray.ppo import metrics
from rlhf_ray.ppo.metrics import StepClock, StepHeaders, warn_if_off_policy
from rlhf_ray.ppo.roles import RoleClasses, role_makers
from rlhf_ray.roles.policy_learner import PolicyReport
from rlhf_ray.tracking.logs import EventLog
from tests.making import random_rollout
from tests.unit.test_ppo_resume import config_of, inputs_of


def report(effective_fraction: float | None) -> PolicyReport:
    stats = ExperienceStats(*(0,) * 3, 0.0, None, *(0.0,) * 4, 0)
    numbers = dict.fromkeys(PolicyReport.__dataclass_fields__, 0.0)
    return PolicyReport(**{**numbers, "stats": stats, "importance_effective_fraction": effective_fraction})


@pytest.mark.parametrize(("fraction", "warned"), [(None, False), (1.0, False), (0.5, False), (0.49, True)])
def test_an_event_says_when_the_samples_are_worth_less_than_half(tmp_path: Path, fraction: float | None, warned: bool):
    path = tmp_path / "events.jsonl"
    warn_if_off_policy(EventLog(path), 7, report(fraction))
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [event["kind"] for event in events] == ["samples_off_policy"] * warned
    for event in events:
        assert (event["step"], event["effective_sample_fraction"]) == (7, 0.49)


def test_staleness_is_that_of_sampled_tokens():
    rollout = random_rollout(0)
    count = len(rollout.logprobs)
    mask = np.arange(count) % 2 == 0
    mask[rollout.response_starts()[:-1]] = True
    rollout = replace(rollout, policy_versions=np.where(mask, 3, 99).astype(np.int32), loss_mask=mask)
    headers = StepHeaders((rollout.header(),), ())
    assert headers.staleness(5) == (2.0, 2)


def test_steps_take_the_whole_time_of_the_run_between_them(monkeypatch: pytest.MonkeyPatch):
    """Judging is the step's own, a checkpoint that is waited for the next one's; none is nobody's."""
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    first = StepClock(60)
    now += 3
    with first.phase("held_out"):
        now += 5
    assert (first.phases, first.step_s) == ({"time/held_out_s": 5.0}, 8.0)
    now += 2
    second = first.next()
    now += 1
    assert second.step_s == 3.0


def test_the_policy_s_schedule_ends_with_its_last_update(tiny: Path):
    config = config_of("steps=100", "algorithm.critic_warmup_steps=40", "algorithm.minibatches=2")
    makers = role_makers(config, inputs_of(), RoleClasses())
    totals = {role: makers[role].make.keywords["total_steps"] for role in ("policy", "critic")}  # type: ignore[attr-defined]
    updates = config.algorithm.epochs * 2
    assert totals == {"policy": 60 * updates, "critic": 100 * updates}
