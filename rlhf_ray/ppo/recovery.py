"""What a run does when it has lost processes that Ray cannot bring back: those that hold a state together.

The ranks of a learner are started anew as one group, the others keep their processes; then the run goes back to its
newest checkpoint, and does the steps since once more. Draws are keyed and weights are versioned, so they come out as
they did before.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Set
from typing import Any

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import FailureKind, RoleFailure, first_sentence
from rlhf_ray.ppo.roles import Roles, RoleStarter
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import collect
from rlhf_ray.runtime.run import Run

_ANSWER_S = 30.0
"""How long a process may take to show that it is there."""


class Recovery:
    """Replaces lost groups, within a budget.

    Args:
        starter: started the roles.
        run: that goes back to its newest checkpoint.
    """

    def __init__(self, config: PPOConfig, starter: RoleStarter, run: Run) -> None:
        self._config, self._starter, self._run = config, starter, run
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def start(self) -> Roles:
        """The roles as a run begins. Nothing is done yet that a group lost meanwhile would have to go back to.

        Raises:
            RoleFailure: no room in the cluster; or a role could not be built, and would not be another time.
        """
        while True:
            try:
                return self._starter.start()
            except RoleFailure as failure:
                if failure.kind is not FailureKind.INFRASTRUCTURE or failure.group not in self._held():
                    raise
                self._spend({failure.group}, failure)
                self._note_lost(failure)
                self._run.tracker.display.message(
                    f"lost {failure.role} on {failure.node} ({first_sentence(failure.cause)}); starting "
                    f"{failure.group} again"
                )

    def after(self, failure: RoleFailure) -> Roles:
        """The roles with which the run can go on, from its newest checkpoint.

        Raises:
            RoleFailure: it cannot: the failure would happen again, or happened too often.
        """
        while True:
            if failure.kind is not FailureKind.INFRASTRUCTURE or not (lost := self._lost(failure)):
                raise failure
            self._spend(lost, failure)
            events, started = self._run.tracker.events, time.monotonic()
            self._note_lost(failure)
            names = self._with_dependents(lost)
            self._run.tracker.phase(f"starting {', '.join(sorted(names))} anew")
            try:
                roles = self._starter.renew(names)
            except RoleFailure as again:
                failure = again
                continue
            for name in sorted(names):
                seconds = round(time.monotonic() - started, 1)
                events.write("group_rebuilt", role=name, cause=failure.cause, seconds=seconds)
            self._run.go_back(failure)
            return roles

    def _lost(self, failure: RoleFailure) -> set[str]:
        """Roles that have to be started anew: the one that failed, and those that do not answer."""
        held = self._held()
        silent = {role for role, group in self._starter.groups.items() if role in held and not _answers(group)}
        return silent | ({failure.group} & held)

    def _held(self) -> set[str]:
        """Roles whose lost processes Ray cannot bring back."""
        return {role for role, maker in self._starter.makers.items() if not maker.restarts}

    def _note_lost(self, failure: RoleFailure) -> None:
        self._run.tracker.events.write("role_lost", role=failure.role, node=failure.node, cause=failure.cause)

    def _with_dependents(self, lost: Set[str]) -> set[str]:
        config, learners = self._config, {"policy"} | ({"critic"} if self._config.critic is not None else set())
        names = set(lost)
        if self._run.folder.latest_checkpoint() is None:
            names |= learners  # there is no state that they could go back to
        if config.weights.transport == "nccl" or config.algorithm.in_flight_updates:
            # They have met the old ranks; or have weights that are newer than any that the run knows again.
            names |= {"generator"}
        if config.weights.transport == "nccl":
            names |= {"policy"}
        return names

    def _spend(self, lost: Set[str], failure: RoleFailure) -> None:
        now, cluster = time.monotonic(), self._config.cluster
        for name in lost:
            times = self._times[name]
            times.append(now)
            while now - times[0] > cluster.restart_window_s:
                times.popleft()
            if len(times) > cluster.max_restarts:
                raise RoleFailure(
                    FailureKind.FATAL,
                    failure.role,
                    failure.node,
                    f"lost {len(times)} times within {cluster.restart_window_s:.0f} s; cluster.max_restarts allows "
                    f"{cluster.max_restarts}. The last time: {failure.cause}",
                    failure.details,
                )


def _answers(group: ActorGroup[Any]) -> bool:
    try:
        collect([replica.pulse() for replica in group], _ANSWER_S)
    except RoleFailure:
        return False
    return True
