"""Judging on held-out prompts, and which weights are kept as the best; without any role."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.held_out import Best, HeldOut
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.reward.core.evaluator import EvaluatedSample
from rlhf_ray.runtime.run import Run
from tests.making import unread_config
from tests.unit.test_ppo_resume import config_of, inputs_of

JUDGED = "evaluation.prompts={path: x}"


def sample(reward: float) -> EvaluatedSample:
    return EvaluatedSample(
        sample_id=0,
        prompt_id=0,
        prompt="p",
        response="r",
        num_tokens=1,
        kl=None,
        reward=reward,
        failure="",
        judgement=-reward,
    )


class Judged:
    """A run of which the policy's reward after each step is given."""

    def __init__(self, folder: Path, rewards: Callable[[int], float], *overrides: str) -> None:
        self.judged: list[int] = []
        config: PPOConfig = config_of(JUDGED, "evaluation.every_steps=2", "evaluation.judge=vader", *overrides)
        plain = unread_config(folder, every_steps=100)
        self.run = Run(plain, "ppo", "x", 9, (), plain.checkpoint, (folder / "x").exists())
        self.rewards = rewards
        roles = SimpleNamespace(policy=SimpleNamespace(call_all=self.export), has_reference=False)
        self.held_out = HeldOut(config, cast(Inputs, inputs_of()), cast(Roles, roles), self.run)
        self.step = 0

    def export(self, method: Any, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "weights").write_text(str(self.step))

    def during(self, step: int) -> dict[str, Any]:
        self.step = step
        return self.held_out.judge_during(step, cast(Any, step))

    @property
    def weights(self) -> str:
        return (self.run.folder.policy_best / "weights").read_text()


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judged]:
    made: list[Judged] = []

    def evaluate(self: HeldOut, step: int, with_kl: bool) -> Sequence[EvaluatedSample]:
        made[-1].judged.append(step)
        return [sample(made[-1].rewards(step))]

    def make(rewards: Callable[[int], float], *overrides: str) -> Judged:
        made.append(Judged(tmp_path, rewards, *overrides))
        return made[-1]

    monkeypatch.setattr(HeldOut, "_evaluate", evaluate)
    return make


def test_the_best_is_what_is_in_its_folder_whatever_the_run_went_back_to(judged: Callable[..., Judged]):
    first = judged({2: 0.5, 4: 0.6}.get, "evaluation.keep_best=reward")
    with first.run:
        assert [step for step in range(1, 5) if first.held_out.is_due(step)] == [2, 4]
        assert [first.during(step)["held_out/reward"] for step in (2, 4)] == [0.5, 0.6]
    again = judged({4: 0.55, 6: 0.58}.get, "evaluation.keep_best=reward")
    with again.run:
        for step in (4, 6):
            again.during(step)
    assert again.held_out.best() == Best(4, "reward", 0.6)
    assert again.weights == "4"


def test_values_of_another_metric_are_not_compared(judged: Callable[..., Judged]):
    first = judged({2: 0.5}.get, "evaluation.keep_best=reward")
    with first.run:
        first.during(2)
    other = judged({4: 0.9}.get, "evaluation.keep_best=judge")
    with other.run:
        assert other.held_out.best() is None
        other.during(4)
    assert other.held_out.best() == Best(4, "judge", -0.9)


def test_the_last_policy_may_be_the_best_and_is_judged_once(judged: Callable[..., Judged]):
    run = judged({2: 0.5, 3: 0.7, 4: 0.6}.get, "evaluation.keep_best=reward")
    with run.run:
        run.during(2)
        run.step = 3
        assert [each.reward for each in run.held_out.judge_after(3, cast(Any, 3))] == [0.7]
        assert run.held_out.best() == Best(3, "reward", 0.7)
        run.during(4)
        run.held_out.judge_after(4, cast(Any, 4))
    assert run.judged == [2, 3, 4]


def test_half_written_weights_are_no_best(judged: Callable[..., Judged], monkeypatch: pytest.MonkeyPatch):
    run = judged({2: 0.5, 4: 0.6}.get, "evaluation.keep_best=reward")
    with run.run:
        run.during(2)

        def lost(*_: Any) -> None:
            raise KeyError("the rank is gone")

        monkeypatch.setattr(run.held_out._roles.policy, "call_all", lost)
        with pytest.raises(KeyError):
            run.during(4)
    assert run.held_out.best() is None


def test_a_run_that_begins_anew_has_no_best(judged: Callable[..., Judged]):
    run = judged({2: 0.5}.get, "evaluation.keep_best=reward")
    with run.run:
        run.during(2)
        run.held_out.forget_best()
    assert run.held_out.best() is None
