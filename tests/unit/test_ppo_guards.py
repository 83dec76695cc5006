"""What stops a run on purpose: each guard where it must, and nowhere else."""

import ast
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.algorithms.experience import ExperienceStats
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.ppo.guards import check_finite, check_scores, kl_beyond
from rlhf_ray.ppo.metrics import StepHeaders
from rlhf_ray.ppo.scoring import SourceHeaders
from rlhf_ray.roles.critic_learner import CriticReport
from rlhf_ray.roles.policy_learner import PolicyReport
from rlhf_ray.rollout import RewardColumn
from rlhf_ray.tracking import tracker
from tests.conftest import REPOSITORY
from tests.making import random_rollout

NAN, INF = float("nan"), float("inf")
STATS = ExperienceStats(4, 4, 20, 0.1, 2.0, 0.0, 1.0, 5.0, 0.0, 0)
NUMBERS: dict[str, Any] = dict.fromkeys(PolicyReport.__dataclass_fields__, 0.5)
POLICY = PolicyReport(**{**NUMBERS, "stats": STATS})
CRITIC = CriticReport(0.1, 0.0, NAN, 0.3, 1.0, 1e-6)


def headers(*sources: tuple[RewardSettings, list[float]]) -> StepHeaders:
    """Of one shard of four samples; NaN: no score."""
    rollout = random_rollout(0).header()
    columns = [
        RewardColumn(np.array(scores), tuple("timed out" if np.isnan(score) else "" for score in scores), "v")
        for _, scores in sources
    ]
    told = [SourceHeaders(source, (column.header(),)) for (source, _), column in zip(sources, columns, strict=True)]
    return StepHeaders((rollout,), tuple(told))


def source(**chosen: Any) -> RewardSettings:
    return RewardSettings(name="picky", function="my:f", **chosen)


def test_numbers_that_are_finite_stop_nothing():
    check_finite(3, POLICY, CRITIC)
    check_finite(3, replace(POLICY, stats=replace(STATS, kl_reference=None)), None)
    # No token had an advantage: all groups were uniform.
    check_finite(3, replace(POLICY, stats=replace(STATS, advantage_mean=NAN, advantage_std=NAN)), None)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("role", "name", "of"),
    [
        ("reference", "kl/reference", {"kl_reference"}),
        ("policy", "reward/shaped_mean", {"shaped_reward_mean"}),
        ("policy", "policy/loss", {"loss"}),
        ("policy", "policy/entropy", {"entropy"}),
        ("policy", "policy/grad_norm", {"grad_norm"}),
    ],
)
def test_a_number_of_the_policy_that_is_not_finite_is_named(role: str, name: str, of: set[str], value: float):
    [field] = of
    broken = replace(POLICY, stats=replace(STATS, **{field: value})) if hasattr(STATS, field) else None
    _refused(broken or replace(POLICY, **{field: value}), CRITIC, role, f"{name} is {value} at step 3")


@pytest.mark.parametrize(
    ("name", "field"), [("value/loss", "loss"), ("return/mean", "return_mean"), ("critic/grad_norm", "grad_norm")]
)
def test_a_number_of_the_critic_that_is_not_finite_is_named(name: str, field: str):
    _refused(POLICY, replace(CRITIC, **{field: NAN}), "critic", f"{name} is nan at step 3")


def test_infinite_advantages_are_named():
    _refused(replace(POLICY, stats=replace(STATS, advantage_std=INF)), None, "policy", "advantage/std is inf at step 3")


def _refused(policy: PolicyReport, critic: CriticReport | None, role: str, cause: str) -> None:
    with pytest.raises(RoleFailure, match="lower the learning rate") as failure:
        check_finite(3, policy, critic)
    assert failure.value.cause.startswith(cause)
    assert (failure.value.role, failure.value.kind, failure.value.guard) == (role, FailureKind.FATAL, "finite")


def test_a_guard_is_known_on_the_other_side_of_an_actor():
    failure = pickle.loads(pickle.dumps(RoleFailure(FailureKind.FATAL, "policy-1", "n", "why", "trace", "gradient")))
    assert (failure.role, failure.cause, failure.details, failure.guard) == ("policy-1", "why", "trace", "gradient")


@pytest.mark.parametrize(
    ("chosen", "scores"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({}, [NAN, NAN, 1.0, 1.0]),
        ({"max_failed_fraction": 0.75}, [NAN, NAN, NAN, 1.0]),
    ],
)
def test_failed_scores_up_to_the_limit_are_set_aside(chosen: dict[str, Any], scores: list[float]):
    check_scores(headers((source(**chosen), scores)), 3)


@pytest.mark.parametrize(
    ("chosen", "scores", "role", "cause"),
    [
        (
            {},
            [NAN, NAN, NAN, 1.0],
            "reward 'picky'",
            "3 samples of step 3 have no score, 75% of them, above max_failed_fraction 0.5: {'timed out': 3}; mend",
        ),
        (
            {"max_failed_fraction": 0.0},
            [NAN, 1.0, 1.0, 1.0],
            "reward 'picky'",
            "1 samples of step 3 have no score, 25% of them, above max_failed_fraction 0:",
        ),
        (
            {"on_failure": "fail"},
            [NAN, 1.0, 1.0, 1.0],
            "reward 'picky'",
            "1 samples of step 3 have no score, and on_failure is 'fail': {'timed out': 1}",
        ),
        ({"max_failed_fraction": 1.0}, [NAN] * 4, "reward", "not one sample of step 3 has a score: {'timed out': 4}"),
    ],
)
def test_more_failed_scores_than_that_end_the_run(chosen: dict[str, Any], scores: list[float], role: str, cause: str):
    with pytest.raises(RoleFailure) as failure:
        check_scores(headers((source(**chosen), scores)), 3)
    assert (failure.value.role, failure.value.guard) == (role, "scores")
    assert failure.value.cause.startswith(cause)


def test_a_source_that_is_only_logged_may_fail():
    check_scores(headers((source(), [1.0] * 4), (source(weight=0.0), [NAN] * 4)), 3)


def test_the_divergence_ends_the_run_above_its_limit_only():
    assert kl_beyond(None, 1.0) is None
    assert kl_beyond(5.0, None) is None
    assert kl_beyond(1.0, 1.0) is None
    assert kl_beyond(1.25, 1.0) == "kl/reference is 1.25 nats, above algorithm.kl.stop_above 1"


def test_a_clock_that_is_set_is_noticed(monkeypatch: pytest.MonkeyPatch):
    clock = tracker._WallClock()
    assert abs(clock.jump_s()) < 1
    real = time.time
    monkeypatch.setattr(tracker.time, "time", lambda: real() - 3600)
    assert clock.jump_s() == pytest.approx(-3600, abs=1)
    assert abs(clock.jump_s()) < 1


def test_no_duration_comes_from_a_clock_that_can_be_set():
    """A difference with `time.time()` in it is only allowed beside `time.monotonic()`, to find that it was set."""
    wrong = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno}"
        for file in Path(REPOSITORY / "rlhf_ray").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and "time.time()" in ast.unparse(node)
        and "time.monotonic()" not in ast.unparse(node)
    ]
    assert wrong == []
