"""The roles of a PPO run as actor groups: reserved, started and built together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import RoleFailure
from rlhf_ray.ppo.inputs import Inputs, source_keys
from rlhf_ray.ppo.scoring import SourceGroup, rank_scorer
from rlhf_ray.reward.core.evaluator import Evaluator
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.reference import Reference
from rlhf_ray.runtime.actor_group import ActorGroup, Launched
from rlhf_ray.runtime.answers import Answer, collect
from rlhf_ray.runtime.cluster import Reservation, RoleRequest, Room, reserve
from rlhf_ray.runtime.learner_group import ranks
from rlhf_ray.runtime.limits import Limits

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


@dataclass(frozen=True)
class Maker:
    """How the processes of one role are made.

    Attributes:
        make: constructor with its arguments; of a rank, all but `rank`.
        has_ranks: the processes are ranks of one process group, and hold a state together.
        restarts: a process keeps nothing between calls that others could not give it again, so Ray may start it again.
    """

    make: Callable[..., Any]
    has_ranks: bool = False
    restarts: bool = True

    def build(self, group: ActorGroup[Any]) -> list[Answer[None]]:
        """Begin to build the role in every process of a group."""
        if not self.has_ranks:
            return group.build(self.make)
        return group.build(*(partial(self.make, rank=rank) for rank in ranks(group)))


class RoleStarter:
    """Starts the processes of a run, and starts those of some roles anew.

    Args:
        logs: folder for what the processes print.
        classes: what is built in them.
        watch: told of all groups and of their room whenever some of them are new, before they load their models.

    Attributes:
        makers: how each role is made.
        groups: those that were started, by role.
    """

    def __init__(
        self,
        config: PPOConfig,
        inputs: Inputs,
        logs: Path,
        classes: RoleClasses,
        watch: Callable[[Iterable[ActorGroup[Any]], Reservation], None],
    ) -> None:
        self._config, self._inputs, self._logs, self._watch = config, inputs, logs, watch
        self._limits = Limits.of(config.cluster)
        self.makers = role_makers(config, inputs, classes)
        self._requests = role_requests(config)
        self._reservation: Reservation | None = None
        self.groups: dict[str, ActorGroup[Any]] = {}
        self._launched: dict[str, Launched] = {}
        self._building: dict[str, list[Answer[None]]] = {}

    def start(self) -> Roles:
        """Start every process that there is none of yet, and load every model, all at once.

        Raises:
            RoleFailure: no room in the cluster; or of a role that could not be built. Its processes are ended; all
                others go on loading, and are there when this is called again.
        """
        if self._reservation is None:
            self._reservation = reserve(self._requests, self._config.cluster)
        else:
            self._reservation.wait()
        self._launch(self._reservation)
        try:
            for role in list(self._launched):
                # Whoever is there first begins to load its model.
                self.groups[role] = self._launched.pop(role).group()
                self._watch(self.groups.values(), self._reservation)
                self._building[role] = self.makers[role].build(self.groups[role])
            collect([answer for answers in self._building.values() for answer in answers], self._limits.start_s)
        except RoleFailure as failure:
            self._end({failure.group})
            raise
        return roles_of(self._config, self._inputs, self.groups)

    def _launch(self, reservation: Reservation) -> None:
        room = Room.of(self._requests)
        for role, settings in room.settings.items():
            if role not in self.groups and role not in self._launched:
                remake = self.makers[role].make if self.makers[role].restarts else None
                self._launched[role] = Launched.of(
                    role, settings, reservation.group, room.first_bundle[role], self._logs, self._limits, remake
                )

    def renew(self, names: Set[str]) -> Roles:
        """End the processes of some roles, whatever they are doing, and start others in their places.

        Raises:
            RoleFailure: as `start`.
        """
        self._end(names)
        return self.start()

    def _end(self, names: Set[str]) -> None:
        for name in names & self.groups.keys():
            self.groups.pop(name).end()
            self._building.pop(name, None)


def roles_of(config: PPOConfig, inputs: Inputs, groups: Mapping[str, ActorGroup[Any]]) -> Roles:
    """The groups by what they are to the loop.

    Args:
        groups: by the names of `role_requests`.
    """
    return Roles(
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


def role_makers(config: PPOConfig, inputs: Inputs, classes: RoleClasses) -> dict[str, Maker]:
    """How each role is made, by the names of `role_requests`."""
    policy, algorithm, temperature = config.policy, config.algorithm, config.sampling.temperature
    step_updates, seed = algorithm.epochs * algorithm.minibatches, config.run.seed
    generator = partial(
        classes.generator,
        policy.model,
        config.generator,
        inputs.context_tokens,
        inputs.eos_token_id,
        config.weights,
        algorithm.in_flight_updates,
    )
    # An engine that has met the learner in a group of NCCL cannot be replaced alone.
    makers = {"generator": Maker(generator, restarts=config.weights.transport != "nccl")}
    for name, source in zip(scorer_names(config), inputs.rewards, strict=True):
        if source.settings.sharded:
            makers[name] = Maker(partial(rank_scorer, source, policy.model), has_ranks=True, restarts=False)
        else:
            makers[name] = Maker(source.constructor(policy.model))
    learner = partial(
        classes.policy,
        policy,
        algorithm,
        # While the critic warms up, the policy makes none.
        total_steps=(config.steps - algorithm.critic_warmup_steps) * step_updates,
        temperature=temperature,
        max_response_tokens=config.sampling.max_response_tokens,
        seed=seed,
        shares_trunk="policy" in inputs.trunk_sharers,
        shares_gpu=config.generator.sleep,
    )
    makers["policy"] = Maker(learner, has_ranks=True, restarts=False)
    reference = config.reference_role
    if reference is not None:
        cut = policy.learner.trainable_top_layers if inputs.trunk_sharers else None
        frozen = partial(classes.reference, reference.model or policy.model, reference, temperature, cut)
        makers["reference"] = Maker(frozen, has_ranks=reference.sharded, restarts=not reference.sharded)
    if config.critic is not None:
        critic = partial(
            classes.critic,
            config.critic,
            config.critic.model or policy.model,
            algorithm,
            total_steps=config.steps * step_updates,
            max_response_tokens=config.sampling.max_response_tokens,
            seed=seed,
            shares_trunk="critic" in inputs.trunk_sharers,
        )
        makers["critic"] = Maker(critic, has_ranks=True, restarts=False)
    if config.evaluation.prompts is not None:
        makers["evaluator"] = Maker(partial(classes.evaluator, policy.model, config.evaluation.judge))
    return makers
