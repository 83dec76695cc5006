"""How a step's data flows: plans become rollouts, rollouts get their columns, columns reach the learners.

The driver moves references and reads headers. Who does which shard is fixed by the shard's place in the step,
never by who is free first. Roles that never change are asked for their columns as soon as a shard is handed out;
learners when it is the step's turn, after what they were asked for before, so that a column is of the version that the
step trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.algorithms.experience import ExperienceShard
from rlhf_ray.config.settings import SamplingSettings
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.metrics import StepClock, StepHeaders
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.ppo.scoring import ShardRewards, SourceHeaders
from rlhf_ray.reward.core.protocol import Conversation, Scorer
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.generator import Generator, ShardPlan, cut_into_shards
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import RewardColumn, Rollout, TokenColumn, TrunkColumn
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, Deferred, Stored


@dataclass(frozen=True)
class Shard:
    """One shard as it was sampled.

    Attributes:
        plan: what was asked for.
        prompts: by prompt id, for the reward model.
        rollout: the rows.
    """

    plan: ShardPlan
    prompts: dict[int, Conversation]
    rollout: Stored[Rollout]


@dataclass(frozen=True)
class TrainingShard:
    """One shard that is trained on: rows, and what the roles add to them."""

    rollout: Stored[Rollout]
    rewards: Deferred[RewardColumn]
    trunk: Stored[TrunkColumn] | None = None
    reference: Stored[TokenColumn] | None = None
    values: Stored[TokenColumn] | None = None
    policy: Stored[TokenColumn] | None = None

    def experience(self, *, with_trunk: bool) -> Deferred[ExperienceShard]:
        """Rows and columns, put together in the learner.

        Args:
            with_trunk: the learner begins behind the frozen layers.
        """
        present = {name: each.data for name, each in vars(self).items() if isinstance(each, Stored)}
        if not with_trunk:
            present.pop("trunk", None)
        return Assembly(ExperienceShard, {**present, "rewards": self.rewards})


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
        stop=sampling.stop,
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


def score(roles: Roles, shards: Sequence[Shard]) -> list[ShardRewards]:
    """Ask the scorers of every source."""
    rewards = [
        ShardRewards.ask(roles.sources, index, shard.rollout.data, shard.prompts) for index, shard in enumerate(shards)
    ]
    # Ranks that share a model make every pass together: all are asked for as many shards, the last one again.
    uneven = [source for source in roles.sources if source.settings.sharded and len(shards) % len(source.scorers)]
    for source in uneven:
        for index in range(len(shards), len(shards) - len(shards) % len(source.scorers) + len(source.scorers)):
            source.scorers.of(index).keep(Scorer.score, shards[-1].rollout.data, shards[-1].prompts)
    return rewards


def refer(roles: Roles, shards: Sequence[Shard]) -> list[Stored[TokenColumn]] | None:
    """Ask for the reference's log-probs of all shards; nothing without a reference."""
    if not roles.has_reference:
        return None
    # Where ranks make every pass together, all are asked for as many: the last shard again where they are not even.
    ranks = 1
    if roles.references is None:
        ranks = len(roles.policy)
    elif roles.reference_is_sharded:
        ranks = len(roles.references)
    evened = [*shards, *[shards[-1]] * (-len(shards) % ranks)]
    columns = [_refer_to(roles, index, shard.rollout.data, None) for index, shard in enumerate(evened)]
    return columns[: len(shards)]


def _refer_to(
    roles: Roles, index: int, rows: Answer[Rollout], states: Answer[TrunkColumn] | None
) -> Stored[TokenColumn]:
    """Ask for the reference's log-probs of the shard in a place of the step."""
    if roles.references is None:
        return roles.policy.of(index).keep(PolicyLearner.reference_logprobs, rows)
    return roles.references.of(index).keep(Reference.logprobs, rows, states)


def frozen_columns(
    roles: Roles, rollouts: Sequence[Stored[Rollout]], rewards: Sequence[Deferred[RewardColumn]]
) -> list[TrainingShard]:
    """Ask the references for their columns of every shard; each begins as soon as the rows are there.

    The ranks of a sharded reference are asked for the same number of shards each, in the same order: their forward
    passes are collectives.
    """
    shards = []
    for index, (rollout, scored) in enumerate(zip(rollouts, rewards, strict=True)):
        trunk = reference = None
        if roles.references is not None:
            # Frozen layers first: everybody else waits for these.
            if roles.trunk_sharers:
                trunk = roles.references.of(index).keep(Reference.trunk, rollout.data)
            reference = _refer_to(roles, index, rollout.data, None if trunk is None else trunk.data)
        shards.append(TrainingShard(rollout, scored, trunk, reference))
    return shards


def shards_of_groups(
    roles: Roles,
    shards: Sequence[Shard],
    rewards: Sequence[ShardRewards],
    places: Sequence[int],
    prompts_per_shard: int,
) -> list[TrainingShard]:
    """Put the chosen groups together in shards of the usual size, and ask the roles that never change for their
    columns.

    Args:
        shards: as they were sampled, of `prompts_per_shard` prompts each.
        rewards: theirs.
        places: of the groups; a multiple of `prompts_per_shard`.
    """
    rollouts: list[Stored[Rollout]] = []
    columns: list[Deferred[RewardColumn]] = []
    for start in range(0, len(places), prompts_per_shard):
        taken: dict[int, list[int]] = {}
        for place in places[start : start + prompts_per_shard]:
            shard, group = divmod(place, prompts_per_shard)
            count = shards[shard].plan.samples_per_prompt
            taken.setdefault(shard, []).extend(range(group * count, (group + 1) * count))
        samples = list(taken.values())
        rows = AllOf(tuple(shards[shard].rollout.data for shard in taken))
        # In a thread of its own: the engine may be sampling the next step already.
        rollouts.append(roles.generators.of(len(rollouts)).beside.keep(Generator.gather, rows, samples))
        scored = AllOf(tuple(rewards[shard].data for shard in taken))
        columns.append(Assembly(RewardColumn.gathered, {"columns": scored, "samples": samples}))
    return frozen_columns(roles, rollouts, columns)


def learner_columns(roles: Roles, shards: Sequence[TrainingShard], old_logprobs: bool) -> list[TrainingShard]:
    """Ask the learners for their columns as well, as they are now.

    The ranks of a learner are asked for the same number of shards each, in the same order: their forward passes are
    collectives.

    Args:
        old_logprobs: ask the policy learner for its own log-probs.
    """
    complete = []
    for index, shard in enumerate(shards):
        rows = shard.rollout.data
        states = None if shard.trunk is None else shard.trunk.data
        reference, values, policy = shard.reference, None, None
        if roles.policy_is_reference:
            reference = _refer_to(roles, index, rows, None)
        if roles.critic is not None:
            begun_at = states if "critic" in roles.trunk_sharers else None
            values = roles.critic.of(index).keep(CriticLearner.values, rows, begun_at)
        if old_logprobs:
            policy = roles.policy.of(index).keep(PolicyLearner.logprobs, rows, states)
        complete.append(replace(shard, reference=reference, values=values, policy=policy))
    return complete


def train_policy(
    roles: Roles, shards: Sequence[TrainingShard], step: int, kl_coefficient: float
) -> list[Answer[PolicyReport]]:
    """Every rank learns from its own shards."""
    experience = [shard.experience(with_trunk=True) for shard in shards]
    ranks = len(roles.policy)
    return [
        replica.ask(PolicyLearner.train, step, AllOf(tuple(experience[rank::ranks])), kl_coefficient)
        for rank, replica in enumerate(roles.policy)
    ]


def train_critic(
    roles: Roles, shards: Sequence[TrainingShard], step: int, kl_coefficient: float
) -> list[Answer[CriticReport]]:
    """As `train_policy`; nothing without a critic."""
    critic, with_trunk = roles.critic, "critic" in roles.trunk_sharers
    if critic is None:
        return []
    experience = [shard.experience(with_trunk=with_trunk) for shard in shards]
    return [
        replica.ask(CriticLearner.train, step, AllOf(tuple(experience[rank :: len(critic)])), kl_coefficient)
        for rank, replica in enumerate(critic)
    ]


def wait_for_columns(
    sampled: Sequence[Shard], rewards: Sequence[ShardRewards], trained: Sequence[TrainingShard], clock: StepClock
) -> StepHeaders:
    """Wait until every shard is sampled and scored, and those that are trained on have all their columns.

    Raises:
        RoleFailure: of whichever role failed first, whatever the others are doing.
    """

    def headers(name: str) -> list[Answer[Any]]:
        stored = [vars(shard)[name] for shard in trained]
        return [each.header for each in stored if each is not None]

    done = clock.wait(
        {
            "generate": [shard.rollout.header for shard in sampled],
            "reward": [header for each in rewards for header in each.headers],
            "reference": headers("trunk") + headers("reference"),
            "values": headers("values"),
            "old_logprobs": headers("policy"),
        }
    )
    return StepHeaders(tuple(done["generate"]), SourceHeaders.by_source(rewards, done["reward"]))
