"""What the driver makes of the learners' reports and the headers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.algorithms.experience import ExperienceStats
from rlhf_ray.ppo.metrics import StepHeaders, warn_if_off_policy
from rlhf_ray.roles.policy_learner import PolicyReport
from rlhf_ray.tracking.logs import EventLog
from tests.making import random_rollout


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
