"""How a step's data flows: plans become rollouts, rollouts get their columns, columns reach the learners.

The driver moves references and reads headers. Who does which shard is fixed by the shard's place in the step,
never by who is free first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.algorithms.experience import ExperienceShard
from rlhf_ray.config.settings import SamplingSettings
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.metrics import StepClock, StepHeaders
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.reward.core.protocol import Conversation, Scorer
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.generator import Generator, ShardPlan, cut_into_shards
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import RewardColumn, Rollout, TokenColumn, TrunkColumn
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, Deferred, Stored


@dataclass(frozen=True)
class Shard:
    """One shard as the driver knows it.

    Attributes:
        plan: what was asked for.
        prompts: by prompt id, for the reward model.
        rollout: the rows.
    """

    plan: ShardPlan
    prompts: dict[int, Conversation]
    rollout: Stored[Rollout]


@dataclass(frozen=True)
class Columns:
    """What the roles add to one shard."""

    rewards: Stored[RewardColumn]
    trunk: Stored[TrunkColumn] | None
    reference: Stored[TokenColumn] | None
    values: Stored[TokenColumn] | None
    policy: Stored[TokenColumn] | None

    def experience(self, shard: Shard, *, with_trunk: bool) -> Deferred[ExperienceShard]:
        """Rows and columns, put together in the learner.

        Args:
            with_trunk: the learner begins behind the frozen layers.
        """
        present = {name: column.data for name, column in vars(self).items() if column is not None}
        if not with_trunk:
            present.pop("trunk", None)
        return Assembly(ExperienceShard, {"rollout": shard.rollout.data, **present})


def plan_shards(
    drawn: Sequence[tuple[int, Prompt]],
    sampling: SamplingSettings,
    seed: int,
    purpose: str,
    *,
    samples_per_prompt: int | None = None,
) -> list[ShardPlan]:
    """The shards of drawn prompts, as the settings cut them.

    Args:
        drawn: run-wide draw id and prompt.
        purpose: what is sampled for (`train`, `held-out`).
    """
    return cut_into_shards(
        [(number, prompt.token_ids) for number, prompt in drawn],
        seed,
        purpose,
        prompts_per_shard=sampling.prompts_per_shard,
        samples_per_prompt=samples_per_prompt or sampling.samples_per_prompt,
        temperature=sampling.temperature,
        max_response_tokens=sampling.max_response_tokens,
    )


def conversations(drawn: Sequence[tuple[int, Prompt]]) -> dict[int, Conversation]:
    """What the scorers are told of each prompt, by its draw id."""
    return {number: Conversation(prompt.text, prompt.messages, prompt.label) for number, prompt in drawn}


def generate(
    roles: Roles,
    plans: Sequence[ShardPlan],
    drawn: Sequence[tuple[int, Prompt]],
    snapshot: Snapshot | Deferred[Snapshot],
) -> list[Shard]:
    """Ask the generators for all shards, shard i of generator i mod n.

    Args:
        snapshot: the weights to sample with.
    """
    asked = conversations(drawn)
    return [
        Shard(
            plan,
            {number: asked[number] for number in plan.prompt_ids},
            roles.generators.of(plan.index).keep(Generator.generate, plan, snapshot),
        )
        for plan in plans
    ]


def score(roles: Roles, shards: Sequence[Shard]) -> list[Stored[RewardColumn]]:
    """Ask the reward scorers."""
    return [
        roles.scorers.of(index).keep(Scorer.score, shard.rollout.data, shard.prompts)
        for index, shard in enumerate(shards)
    ]


def refer(roles: Roles, shards: Sequence[Shard]) -> list[Stored[TokenColumn]] | None:
    """Ask for the reference's log-probs of all shards; nothing without a reference."""
    if not roles.has_reference:
        return None
    # A learner's ranks are asked for the same number each: the last shards again where they do not divide evenly.
    surplus = -len(shards) % len(roles.policy) if roles.policy_is_reference else 0
    asked = [*shards, *[shards[-1]] * surplus]
    columns = [_refer_to(roles, index, shard.rollout.data, None) for index, shard in enumerate(asked)]
    return columns[: len(shards)]


def _refer_to(
    roles: Roles, index: int, rows: Answer[Rollout], states: Answer[TrunkColumn] | None
) -> Stored[TokenColumn]:
    """Ask for the reference's log-probs of the shard in a place of the step."""
    if roles.references is None:
        return roles.policy.of(index).keep(PolicyLearner.reference_logprobs, rows)
    return roles.references.of(index).keep(Reference.logprobs, rows, states)


def add_columns(roles: Roles, shards: Sequence[Shard], old_logprobs: bool) -> list[Columns]:
    """Ask every role for its column of every shard; each begins as soon as the shard is there.

    The ranks of a learner are asked for the same number of shards each, in the same order: their forward passes are
    collectives.

    Args:
        old_logprobs: ask the policy learner for its own log-probs too.
    """
    columns = []
    for index, (shard, rewards) in enumerate(zip(shards, score(roles, shards), strict=True)):
        rows = shard.rollout.data
        trunk = reference = values = policy = None
        states: Answer[TrunkColumn] | None = None
        # Frozen layers first: everybody else waits for these.
        if roles.references is not None and roles.trunk_sharers:
            trunk = roles.references.of(index).keep(Reference.trunk, rows)
            states = trunk.data
        if roles.has_reference:
            reference = _refer_to(roles, index, rows, states)
        if roles.critic is not None:
            begun_at = states if "critic" in roles.trunk_sharers else None
            values = roles.critic.of(index).keep(CriticLearner.values, rows, begun_at)
        if old_logprobs:
            policy = roles.policy.of(index).keep(PolicyLearner.logprobs, rows, states)
        columns.append(Columns(rewards, trunk, reference, values, policy))
    return columns


def train_policy(
    roles: Roles, shards: Sequence[Shard], columns: Sequence[Columns], step: int, kl_coefficient: float
) -> list[Answer[PolicyReport]]:
    """Every rank learns from its own shards."""
    experience = [column.experience(shard, with_trunk=True) for shard, column in zip(shards, columns, strict=True)]
    ranks = len(roles.policy)
    return [
        replica.ask(PolicyLearner.train, step, AllOf(tuple(experience[rank::ranks])), kl_coefficient)
        for rank, replica in enumerate(roles.policy)
    ]


def train_critic(
    roles: Roles, shards: Sequence[Shard], columns: Sequence[Columns], step: int, kl_coefficient: float
) -> list[Answer[CriticReport]]:
    """As `train_policy`; nothing without a critic."""
    critic, with_trunk = roles.critic, "critic" in roles.trunk_sharers
    if critic is None:
        return []
    experience = [
        column.experience(shard, with_trunk=with_trunk) for shard, column in zip(shards, columns, strict=True)
    ]
    return [
        replica.ask(CriticLearner.train, step, AllOf(tuple(experience[rank :: len(critic)])), kl_coefficient)
        for rank, replica in enumerate(critic)
    ]


def wait_for_columns(shards: Sequence[Shard], columns: Sequence[Columns], clock: StepClock) -> StepHeaders:
    """Wait until every shard is sampled and has all its columns.

    Raises:
        RoleFailure: of whichever role failed first, whatever the others are doing.
    """

    def headers(name: str) -> list[Answer[Any]]:
        stored = [vars(column)[name] for column in columns]
        return [each.header for each in stored if each is not None]

    done = clock.wait(
        {
            "generate": [shard.rollout.header for shard in shards],
            "reward": headers("rewards"),
            "reference": headers("trunk") + headers("reference"),
            "values": headers("values"),
            "old_logprobs": headers("policy"),
        }
    )
    return StepHeaders(tuple(done["generate"]), tuple(done["reward"]))
