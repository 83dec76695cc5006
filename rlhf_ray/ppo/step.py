"""One step's way of the data: plans become rollouts, rollouts get their columns, columns reach the learners.

The driver moves references and reads headers. Who does which shard is fixed by the shard's place in the step,
never by who is free first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_ray.algorithms.experience import ExperienceShard
from rlhf_ray.config.settings import SamplingSettings
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.ppo.cast import Cast
from rlhf_ray.roles.generator import ShardPlan, cut_into_shards
from rlhf_ray.roles.reward_scorer import Conversation
from rlhf_ray.rollout import RewardHeader, RolloutHeader
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.role_host import Assemble
from rlhf_ray.runtime.waiting import Pending


@dataclass(frozen=True)
class Shard:
    """One shard as the driver knows it.

    Attributes:
        plan: what was asked for.
        prompts: by prompt id, for the reward model.
        rollout: reference of the rows.
        header: pending header of the rows.
    """

    plan: ShardPlan
    prompts: dict[int, Conversation]
    rollout: ray.ObjectRef
    header: Pending


@dataclass(frozen=True)
class StoredColumn:
    """A column that the driver only has the reference of, and the acknowledgement that it is there."""

    reference: ray.ObjectRef
    done: Pending


@dataclass(frozen=True)
class Columns:
    """What the roles add to one shard, as references."""

    rewards: ray.ObjectRef
    reference: ray.ObjectRef | None
    values: ray.ObjectRef | None
    policy: ray.ObjectRef | None


def plan_shards(
    drawn: Sequence[tuple[int, Prompt]],
    sampling: SamplingSettings,
    seed: int,
    purpose: str,
    *,
    samples_per_prompt: int | None = None,
    max_response_tokens: int | None = None,
) -> list[ShardPlan]:
    """The shards of drawn prompts, as the settings cut them.

    Args:
        drawn: run-wide draw id and prompt.
        purpose: what is sampled for (`train`, `held-out`, `probe`).
    """
    return cut_into_shards(
        [(number, prompt.token_ids) for number, prompt in drawn],
        seed,
        purpose,
        prompts_per_shard=sampling.prompts_per_shard,
        samples_per_prompt=samples_per_prompt or sampling.samples_per_prompt,
        temperature=sampling.temperature,
        max_response_tokens=max_response_tokens or sampling.max_response_tokens,
    )


def generate(cast: Cast, plans: Sequence[ShardPlan], drawn: Sequence[tuple[int, Prompt]]) -> list[Shard]:
    """Ask the generators for all shards, shard i of generator i mod n."""
    conversations = {number: Conversation(prompt.text, prompt.messages) for number, prompt in drawn}
    shards = []
    for plan in plans:
        rows, header = cast.generators.submit(plan.index % len(cast.generators), "generate", plan, num_returns=2)
        prompts = {number: conversations[number] for number in plan.prompt_ids}
        shards.append(Shard(plan, prompts, rows.reference, header))
    return shards


def score(cast: Cast, shards: Sequence[Shard]) -> list[tuple[ray.ObjectRef, Pending]]:
    """Ask the reward scorers; for each shard the column's reference and its pending header."""
    scored = []
    for index, shard in enumerate(shards):
        column, header = cast.scorers.submit(
            index % len(cast.scorers), "score", shard.rollout, shard.prompts, num_returns=2
        )
        scored.append((column.reference, header))
    return scored


def refer(cast: Cast, shards: Sequence[Shard]) -> list[StoredColumn] | None:
    """Ask the references for their log-probs; nothing without a reference."""
    group = cast.references
    if group is None:
        return None
    return [_stored(group, index % len(group), "logprobs", shard) for index, shard in enumerate(shards)]


def learner_columns(group: ActorGroup, method: str, shards: Sequence[Shard]) -> list[StoredColumn]:
    """Ask the ranks of a learner for a column of each of their shards, one shard of every rank after the other (a
    collective of all ranks)."""
    return [_stored(group, index % len(group), method, shard) for index, shard in enumerate(shards)]


def _stored(group: ActorGroup, replica: int, method: str, shard: Shard) -> StoredColumn:
    parts = group.submit_parts(replica, method, shard.rollout, num_parts=1)
    return StoredColumn(parts.references[0], parts.done)


def train(
    group: ActorGroup, shards: Sequence[Shard], columns: Sequence[Columns], step: int, *args: Any
) -> list[Pending]:
    """Hand every rank its shards with their columns, and let all ranks train."""
    pending = []
    for rank in range(len(group)):
        own = [_assembled(shards[index], columns[index]) for index in own_shards(rank, len(group), len(shards))]
        pending += group.submit(rank, "train", step, own, *args)
    return pending


def own_shards(rank: int, num_ranks: int, num_shards: int) -> list[int]:
    """The shards of a learner's rank."""
    return list(range(rank, num_shards, num_ranks))


def _assembled(shard: Shard, columns: Columns) -> Assemble:
    every = {"rollout": shard.rollout, **vars(columns)}
    return Assemble(ExperienceShard, {name: reference for name, reference in every.items() if reference is not None})


@dataclass(frozen=True)
class StepHeaders:
    """Sums over the headers of one step."""

    rollouts: tuple[RolloutHeader, ...]
    rewards: tuple[RewardHeader, ...]

    @property
    def num_samples(self) -> int:
        return sum(header.num_samples for header in self.rollouts)

    @property
    def num_response_tokens(self) -> int:
        return sum(header.num_response_tokens for header in self.rollouts)

    @property
    def num_failures(self) -> int:
        return sum(header.num_samples - header.num_scored for header in self.rewards)

    @property
    def failure_causes(self) -> dict[str, int]:
        """How often each cause occurred."""
        causes: dict[str, int] = {}
        for header in self.rewards:
            for cause, count in header.failure_causes.items():
                causes[cause] = causes.get(cause, 0) + count
        return causes

    def staleness(self, version: int) -> tuple[float, int]:
        """Mean and largest distance of the tokens' weights from the learner's, in versions."""
        total = sum(header.num_response_tokens * version - header.version_sum for header in self.rollouts)
        return total / self.num_response_tokens, version - min(header.version_min for header in self.rollouts)
