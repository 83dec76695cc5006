"""Which step is sampled when, and with which weights.

Staleness is one inequality, at admission: step s is sampled with version max(0, s − `max_staleness`), and is handed out
once that version is on its way. Nothing is ever sampled too stale, so nothing is thrown away; and what a step is
sampled with depends on no timing, so an overlapped run can be repeated, and resumed, to the bit. With a staleness of 0
this is the synchronous loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.data.prompts import Prompt, PromptSet
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.ppo.scoring import ShardRewards
from rlhf_ray.ppo.step import (
    Shard,
    TrainingShard,
    conversations,
    frozen_columns,
    generate,
    plan_shards,
    score,
)
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.rollout import RolloutHeader
from rlhf_ray.runtime.answers import Answer, Deferred


@dataclass(frozen=True)
class StepUnderWay:
    """A step that has been handed out.

    Attributes:
        step: number of the step.
        version: the weights that it is sampled with; with in-flight updates, the oldest.
        shards: its rows.
        rewards: theirs.
        trained: what is trained on, with the columns of the roles that never change; nothing with spare prompts, where
            that depends on the scores.
    """

    step: int
    version: int
    shards: list[Shard]
    rewards: list[ShardRewards]
    trained: list[TrainingShard]

    def headers(self) -> list[Answer[RolloutHeader]]:
        """Of every shard: what the generators owe."""
        return [shard.rollout.header for shard in self.shards]


class Admission:
    """Hands out steps to the generators, and gives them back in their order.

    Args:
        prompts: to train on.
    """

    def __init__(self, config: PPOConfig, prompts: PromptSet, roles: Roles) -> None:
        self._config, self._prompts, self._roles = config, prompts, roles
        self._under_way: deque[StepUnderWay] = deque()

    @property
    def max_staleness(self) -> int:
        return self._config.algorithm.max_staleness

    def hand_out(self, version: int, snapshot: Deferred[Snapshot]) -> None:
        """Every step that is sampled with these weights, unless it has been handed out.

        Args:
            version: of the weights.
            snapshot: on its way, or there.
        """
        last = min(version + self.max_staleness, self._config.steps - 1)
        first = self._under_way[-1].step + 1 if self._under_way else version
        for step in range(first, last + 1):
            drawn, plans = self._plans(step)
            self._add(step, version, generate(self._roles, plans, drawn, snapshot))

    def next(self) -> StepUnderWay:
        """The step whose turn it is."""
        return self._under_way.popleft()

    def owed(self) -> list[Answer[RolloutHeader]]:
        """What the generators owe of all steps that have been handed out."""
        return [header for each in self._under_way for header in each.headers()]

    def with_older_weights(self, version: int) -> list[StepUnderWay]:
        """Steps under way whose weights nobody has any more, once the learner has `version`."""
        return [each for each in self._under_way if each.version < version]

    def write(self, steps: Sequence[StepUnderWay], folder: Path) -> list[Answer[None]]:
        """Keep the rows of steps in a checkpoint."""
        [first, *_] = self._roles.generators
        return [
            first.beside.ask(Generator.write, shard.rollout.data, str(_file(folder, each.step, shard.plan.index)))
            for each in steps
            for shard in each.shards
        ]

    def read(self, steps: Sequence[int], folder: Path) -> None:
        """Take up steps whose rows a checkpoint has."""
        [first, *_] = self._roles.generators
        for step in steps:
            drawn, plans = self._plans(step)
            asked = conversations(drawn)
            shards = [
                Shard(
                    plan,
                    {number: asked[number] for number in plan.prompt_ids},
                    first.beside.keep(Generator.read, str(_file(folder, step, plan.index))),
                )
                for plan in plans
            ]
            self._add(step, max(0, step - self.max_staleness), shards)

    def _plans(self, step: int) -> tuple[list[tuple[int, Prompt]], list[ShardPlan]]:
        config = self._config
        drawn = self._prompts.draw(config.run.seed, step, config.sampling.prompts_drawn)
        return drawn, plan_shards(drawn, config.sampling, config.run.seed, "train")

    def _add(self, step: int, version: int, shards: list[Shard]) -> None:
        rewards, trained = score(self._roles, shards), []
        if not self._config.sampling.spare_prompts:
            rollouts = [shard.rollout for shard in shards]
            trained = frozen_columns(self._roles, rollouts, [each.data for each in rewards])
        self._under_way.append(StepUnderWay(step, version, shards, rewards, trained))


def _file(folder: Path, step: int, shard: int) -> Path:
    return folder / f"rollout-{step:06d}-{shard:03d}.npz"
