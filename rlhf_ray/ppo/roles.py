"""The roles of a PPO run as actor groups: reserved, started and built together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.inputs import Inputs, source_keys
from rlhf_ray.ppo.scoring import SourceGroup
from rlhf_ray.reward.core.evaluator import Evaluator
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.reference import Reference
from rlhf_ray.runtime.actor_group import ActorGroup, Deadlines
from rlhf_ray.runtime.answers import Answer, collect
from rlhf_ray.runtime.cluster import RoleRequest, Room, reserve
from rlhf_ray.runtime.learner_group import ranks

_EVALUATOR = ActorSettings(cpus=0.05)


@dataclass(frozen=True)
class RoleClasses:
    """What is built in the processes of each role; scorers come from the reward source. Others than these stand in for
    them where placement, meeting points or the driver's own time are of interest, and not what the roles compute."""

    generator: Callable[..., Generator] = Generator
    policy: Callable[..., PolicyLearner] = PolicyLearner
    critic: Callable[..., CriticLearner] = CriticLearner
    reference: Callable[..., Reference] = Reference
    evaluator: Callable[..., Evaluator] = Evaluator


@dataclass(frozen=True)
class Roles:
    """Actor groups of one PPO run.

    Attributes:
        sources: of rewards, in the order of the configuration.
        policy_is_reference: the policy's learner, without its adapters, computes the reference's log-probs.
        trunk_sharers: the learners that begin behind the frozen layers, whose states the reference computes for them.
        reference_is_sharded: the references are ranks that share one model, and make every pass together.
    """

    generators: ActorGroup[Generator]
    sources: tuple[SourceGroup, ...]
    policy: ActorGroup[PolicyLearner]
    references: ActorGroup[Reference] | None
    critic: ActorGroup[CriticLearner] | None
    evaluator: ActorGroup[Evaluator] | None
    policy_is_reference: bool
    trunk_sharers: frozenset[str]
    reference_is_sharded: bool

    @property
    def has_reference(self) -> bool:
        """Whether there are log-probs to measure the KL divergence against."""
        return self.references is not None or self.policy_is_reference

    def groups(self) -> list[ActorGroup[Any]]:
        """All groups there are."""
        scorers = [source.scorers for source in self.sources]
        every = (self.generators, *scorers, self.policy, self.references, self.critic, self.evaluator)
        return [group for group in every if group is not None]

    def save_checkpoint(self, folder: str) -> list[Answer[None]]:
        """Every learner's state."""
        asked = [rank.ask(PolicyLearner.save_checkpoint, folder) for rank in self.policy]
        return asked + [rank.ask(CriticLearner.save_checkpoint, folder) for rank in self.critic or ()]

    def load_checkpoint(self, folder: str) -> list[Answer[None]]:
        """Every learner back at a saved state."""
        asked = [rank.ask(PolicyLearner.load_checkpoint, folder) for rank in self.policy]
        return asked + [rank.ask(CriticLearner.load_checkpoint, folder) for rank in self.critic or ()]


def scorer_names(config: PPOConfig) -> list[str]:
    """The role of each source: `reward`, or `reward-<name>` where there are several."""
    several = len(config.reward) > 1
    return [f"reward-{source.name}" if several else "reward" for source in config.reward]


def role_requests(config: PPOConfig) -> list[RoleRequest]:
    """What each role asks of the cluster, with the key where that is said."""
    requests = [
        RoleRequest("generator", "generator", config.generator),
        *(
            RoleRequest(name, key, source)
            for name, key, source in zip(scorer_names(config), source_keys(config), config.reward, strict=True)
        ),
        RoleRequest("policy", "policy.learner", config.policy.learner, "generator" if config.generator.sleep else None),
    ]
    if config.reference_role is not None:
        requests.append(RoleRequest("reference", "reference", config.reference_role))
    if config.critic is not None:
        requests.append(RoleRequest("critic", "critic.learner", config.critic.learner))
    if config.evaluation.prompts is not None:
        requests.append(RoleRequest("evaluator", "evaluation", _EVALUATOR))
    return requests


def start_roles(config: PPOConfig, inputs: Inputs, logs: Path, classes: RoleClasses) -> Roles:
    """Start every process and load every model, all at once.

    Raises:
        RoleFailure: no room in the cluster, or a role could not be built.
    """
    deadlines = Deadlines(config.cluster.start_timeout_s, config.cluster.call_timeout_s)
    requests = role_requests(config)
    placement: PlacementGroup = reserve(requests, config.cluster)
    groups: dict[str, ActorGroup[Any]] = {}
    room = Room.of(requests)
    for role, settings in room.settings.items():
        groups[role] = ActorGroup.start(role, settings, placement, room.first_bundle[role], logs, deadlines)
    roles = Roles(
        generators=groups["generator"],
        sources=tuple(
            SourceGroup(source, groups[name]) for name, source in zip(scorer_names(config), config.reward, strict=True)
        ),
        policy=groups["policy"],
        references=groups.get("reference"),
        critic=groups.get("critic"),
        evaluator=groups.get("evaluator"),
        policy_is_reference=config.policy.lora is not None and config.reference is not None,
        trunk_sharers=inputs.trunk_sharers,
        reference_is_sharded=config.reference is not None and config.reference.sharded,
    )
    collect(build_roles(roles, config, inputs, classes), deadlines.start_s)
    return roles


def build_roles(roles: Roles, config: PPOConfig, inputs: Inputs, classes: RoleClasses) -> list[Answer[None]]:
    """Begin to build every role in its process."""
    policy, algorithm, temperature = config.policy, config.algorithm, config.sampling.temperature
    updates, seed = config.steps * algorithm.epochs * algorithm.minibatches, config.run.seed
    trained = policy.learner.trainable_top_layers
    answers = roles.generators.build(
        partial(
            classes.generator,
            policy.model,
            config.generator,
            inputs.context_tokens,
            inputs.eos_token_id,
            config.weights,
            algorithm.in_flight_updates,
        )
    )
    for group, source in zip(roles.sources, inputs.rewards, strict=True):
        answers += group.scorers.build(source.constructor(policy.model))
    answers += roles.policy.build(
        *(
            partial(
                classes.policy,
                policy,
                algorithm,
                rank,
                total_steps=updates,
                temperature=temperature,
                max_response_tokens=config.sampling.max_response_tokens,
                seed=seed,
                shares_trunk="policy" in roles.trunk_sharers,
            )
            for rank in ranks(roles.policy)
        )
    )
    reference = config.reference_role
    if roles.references is not None and reference is not None:
        model = reference.model or policy.model
        cut = trained if roles.trunk_sharers else None
        places = ranks(roles.references) if roles.reference_is_sharded else [None] * len(roles.references)
        answers += roles.references.build(
            *(partial(classes.reference, model, reference, temperature, cut, place) for place in places)
        )
    if roles.critic is not None and config.critic is not None:
        model = config.critic.model or policy.model
        answers += roles.critic.build(
            *(
                partial(
                    classes.critic,
                    config.critic,
                    model,
                    algorithm,
                    rank,
                    total_steps=updates,
                    max_response_tokens=config.sampling.max_response_tokens,
                    seed=seed,
                    shares_trunk="critic" in roles.trunk_sharers,
                )
                for rank in ranks(roles.critic)
            )
        )
    if roles.evaluator is not None:
        answers += roles.evaluator.build(partial(classes.evaluator, policy.model, config.evaluation.judge))
    return answers
