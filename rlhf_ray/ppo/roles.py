"""The roles of a PPO run as actor groups: reserved, started and built together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.reward.core.evaluator import Evaluator
from rlhf_ray.reward.core.protocol import Scorer
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.reference import Reference
from rlhf_ray.runtime.actor_group import ActorGroup, Deadlines
from rlhf_ray.runtime.answers import Answer, collect
from rlhf_ray.runtime.cluster import RoleRequest, reserve
from rlhf_ray.runtime.learner_group import ranks

_EVALUATOR = ActorSettings(cpus=0.05)


@dataclass(frozen=True)
class Roles:
    """Actor groups of one PPO run.

    Attributes:
        policy_is_reference: the policy's learner, without its adapters, computes the reference's log-probs.
        trunk_sharers: the learners that begin behind the frozen layers, whose states the reference computes for them.
    """

    generators: ActorGroup[Generator]
    scorers: ActorGroup[Scorer]
    policy: ActorGroup[PolicyLearner]
    references: ActorGroup[Reference] | None
    critic: ActorGroup[CriticLearner] | None
    evaluator: ActorGroup[Evaluator] | None
    policy_is_reference: bool
    trunk_sharers: frozenset[str]

    @property
    def has_reference(self) -> bool:
        """Whether there are log-probs to measure the KL divergence against."""
        return self.references is not None or self.policy_is_reference

    def groups(self) -> list[ActorGroup[Any]]:
        """All groups there are."""
        every = (self.generators, self.scorers, self.policy, self.references, self.critic, self.evaluator)
        return [group for group in every if group is not None]

    def save_checkpoint(self, folder: str) -> list[Answer[None]]:
        """Every learner's state."""
        asked = [rank.ask(PolicyLearner.save_checkpoint, folder) for rank in self.policy]
        return asked + [rank.ask(CriticLearner.save_checkpoint, folder) for rank in self.critic or ()]

    def load_checkpoint(self, folder: str) -> list[Answer[None]]:
        """Every learner back at a saved state."""
        asked = [rank.ask(PolicyLearner.load_checkpoint, folder) for rank in self.policy]
        return asked + [rank.ask(CriticLearner.load_checkpoint, folder) for rank in self.critic or ()]


def role_requests(config: PPOConfig) -> list[RoleRequest]:
    """What each role asks of the cluster, with the key where that is said."""
    requests = [
        RoleRequest("generator", "generator", config.generator),
        RoleRequest("reward", "reward", config.reward),
        RoleRequest("policy", "policy.learner", config.policy.learner),
    ]
    if config.reference_role is not None:
        requests.append(RoleRequest("reference", "reference", config.reference_role))
    if config.critic is not None:
        requests.append(RoleRequest("critic", "critic.learner", config.critic.learner))
    if config.evaluation.prompts is not None:
        requests.append(RoleRequest("evaluator", "evaluation", _EVALUATOR))
    return requests


def start_roles(config: PPOConfig, inputs: Inputs, logs: Path) -> Roles:
    """Start every process and load every model, all at once.

    Raises:
        RoleFailure: no room in the cluster, or a role could not be built.
    """
    deadlines = Deadlines(config.cluster.start_timeout_s, config.cluster.call_timeout_s)
    requests = role_requests(config)
    placement: PlacementGroup = reserve(requests, config.cluster)
    groups: dict[str, ActorGroup[Any]] = {}
    first_bundle = 0
    for request in requests:
        groups[request.role] = ActorGroup.start(
            request.role, request.settings, placement, first_bundle, logs, deadlines
        )
        first_bundle += request.settings.replicas
    roles = Roles(
        generators=groups["generator"],
        scorers=groups["reward"],
        policy=groups["policy"],
        references=groups.get("reference"),
        critic=groups.get("critic"),
        evaluator=groups.get("evaluator"),
        policy_is_reference=config.policy.lora is not None and config.reference is not None,
        trunk_sharers=inputs.trunk_sharers,
    )
    collect(_build(roles, config, inputs), deadlines.start_s)
    return roles


def _build(roles: Roles, config: PPOConfig, inputs: Inputs) -> list[Answer[None]]:
    policy, algorithm, temperature = config.policy, config.algorithm, config.sampling.temperature
    updates, seed = config.steps * algorithm.epochs * algorithm.minibatches, config.run.seed
    trained = policy.learner.trainable_top_layers
    answers = roles.generators.build(
        partial(Generator, policy.model, config.generator, inputs.context_tokens, inputs.eos_token_id, config.weights)
    )
    answers += roles.scorers.build(inputs.reward.constructor(policy.model))
    answers += roles.policy.build(
        *(
            partial(
                PolicyLearner,
                policy,
                algorithm,
                rank,
                total_steps=updates,
                temperature=temperature,
                seed=seed,
                shares_trunk="policy" in roles.trunk_sharers,
            )
            for rank in ranks(roles.policy)
        )
    )
    reference = config.reference_role
    if roles.references is not None and reference is not None:
        answers += roles.references.build(
            partial(
                Reference,
                reference.model or policy.model,
                reference,
                temperature,
                trained if roles.trunk_sharers else None,
            )
        )
    if roles.critic is not None and config.critic is not None:
        model = config.critic.model or policy.model
        answers += roles.critic.build(
            *(
                partial(
                    CriticLearner,
                    config.critic,
                    model,
                    algorithm,
                    rank,
                    total_steps=updates,
                    seed=seed,
                    shares_trunk="critic" in roles.trunk_sharers,
                )
                for rank in ranks(roles.critic)
            )
        )
    if roles.evaluator is not None:
        answers += roles.evaluator.build(partial(Evaluator, policy.model, config.evaluation.judge))
    return answers
