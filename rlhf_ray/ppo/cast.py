"""The roles of a PPO run as actor groups: reserved, started and built together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

from rlhf_ray.config.settings import ActorSettings, PPOConfig
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.evaluator import Evaluator
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.reference import Reference
from rlhf_ray.roles.remote_scorer import RemoteScorer, service_token
from rlhf_ray.roles.reward_scorer import RewardScorer
from rlhf_ray.runtime.actor_group import ActorGroup, Deadlines
from rlhf_ray.runtime.cluster import RoleRequest, reserve
from rlhf_ray.runtime.learner_group import ranks
from rlhf_ray.runtime.waiting import Pending, collect

_EVALUATOR = ActorSettings(cpus=0.05)


@dataclass(frozen=True)
class Cast:
    """Who plays.

    Attributes:
        exact: generator and policy learner both compute in float32, so their log-probs must be equal.
    """

    generators: ActorGroup
    scorers: ActorGroup
    policy: ActorGroup
    references: ActorGroup | None
    critic: ActorGroup | None
    evaluator: ActorGroup | None
    exact: bool

    def groups(self) -> list[ActorGroup]:
        """All groups there are."""
        every = (self.generators, self.scorers, self.policy, self.references, self.critic, self.evaluator)
        return [group for group in every if group is not None]


def role_requests(config: PPOConfig) -> list[RoleRequest]:
    """What each role asks of the cluster, with the key where that is said."""
    requests = [
        RoleRequest("generator", "generator", config.generator),
        RoleRequest("reward", "reward", config.reward),
        RoleRequest("policy", "policy.learner", config.policy.learner),
    ]
    if config.reference is not None:
        requests.append(RoleRequest("reference", "reference", config.reference))
    if config.critic is not None:
        requests.append(RoleRequest("critic", "critic.learner", config.critic.learner))
    if config.evaluation.prompts is not None:
        requests.append(RoleRequest("evaluator", "evaluation", _EVALUATOR))
    return requests


def start_cast(config: PPOConfig, inputs: Inputs, logs: Path) -> Cast:
    """Start every process and load every model, all at once.

    Raises:
        RoleFailure: no room in the cluster, or a role could not be made.
    """
    deadlines = Deadlines(config.cluster.start_timeout_s, config.cluster.call_timeout_s)
    requests = role_requests(config)
    placement: PlacementGroup = reserve(requests, config.cluster)
    groups: dict[str, ActorGroup] = {}
    first_bundle = 0
    for request in requests:
        groups[request.role] = ActorGroup.start(
            request.role, request.settings, placement, first_bundle, logs, deadlines
        )
        first_bundle += request.settings.replicas
    cast = Cast(
        generators=groups["generator"],
        scorers=groups["reward"],
        policy=groups["policy"],
        references=groups.get("reference"),
        critic=groups.get("critic"),
        evaluator=groups.get("evaluator"),
        exact=_computes_float32(config),
    )
    collect(_build(cast, config, inputs), deadlines.start_s)
    return cast


def _build(cast: Cast, config: PPOConfig, inputs: Inputs) -> list[Pending]:
    policy, temperature = config.policy, config.sampling.temperature
    updates = config.steps * config.algorithm.epochs * config.algorithm.minibatches
    same: dict[str, tuple[Any, ...]] = {
        "generator": (
            policy.model,
            config.generator,
            inputs.context_tokens,
            inputs.eos_token_id,
            config.weights.transport,
        ),
        "reward": (config.reward, policy.model),
    }
    if config.reward.url is not None:
        # The token is read here: the processes of the cluster may have neither the file nor the variable.
        arguments = (*same["reward"], service_token(config.reward.token_file))
        pending = cast.scorers.build(RemoteScorer, [arguments] * len(cast.scorers))
    else:
        pending = cast.scorers.build(RewardScorer, [same["reward"]] * len(cast.scorers))
    pending += cast.generators.build(Generator, [same["generator"]] * len(cast.generators))
    own: dict[str, Any] = {"total_steps": updates, "seed": config.run.seed}
    build = partial(PolicyLearner, temperature=temperature, **own)
    pending += cast.policy.build(build, [(policy, config.algorithm, rank) for rank in ranks(cast.policy)])
    if cast.references is not None and config.reference is not None:
        arguments = (config.reference.model or policy.model, config.reference, temperature)
        pending += cast.references.build(Reference, [arguments] * len(cast.references))
    if cast.critic is not None and config.critic is not None:
        critic = config.critic
        arguments = (critic, critic.model or policy.model, config.algorithm)
        pending += cast.critic.build(partial(CriticLearner, **own), [(*arguments, rank) for rank in ranks(cast.critic)])
    if cast.evaluator is not None:
        pending += cast.evaluator.build(Evaluator, [(policy.model, config.evaluation.judge)])
    return pending


def _computes_float32(config: PPOConfig) -> bool:
    sides = ((config.generator.dtype, config.generator.gpus), (config.policy.learner.dtype, config.policy.learner.gpus))
    return all(resolve_dtype(dtype, gpus > 0) == "float32" for dtype, gpus in sides)
