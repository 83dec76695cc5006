"""Runs whose roles come one after the other: supervised training, reward-model training and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.runtime.actor_group import ActorGroup, Launched, meeting_point
from rlhf_ray.runtime.cluster import (
    NodeShape,
    RoleRequest,
    check_resources,
    cluster_nodes,
    connect,
    disconnect,
    reserve,
)
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.tracking.tracker import Tracker


@contextmanager
def connected(
    cluster: ClusterSettings,
    phases: Sequence[Sequence[RoleRequest]],
    check: Callable[[Sequence[NodeShape]], None] = lambda nodes: None,
) -> Iterator[None]:
    """A cluster that could hold the roles of each phase, for the length of a block.

    Args:
        check: what else its nodes must satisfy; raises `BadInput`.
    """
    connect(cluster)
    try:
        nodes = cluster_nodes()
        for requests in phases:
            check_resources(requests, nodes)
        check(nodes)
        yield
    finally:
        disconnect()


@contextmanager
def role_group(request: RoleRequest, cluster: ClusterSettings, tracker: Tracker) -> Iterator[ActorGroup[Any]]:
    """The processes of one role, for the length of a block. Whoever waits for one that is lost, or silent, is told."""
    reservation = reserve([request], cluster)
    try:
        group = Launched.of(
            request.role, request.settings, reservation.group, 0, tracker.folder.logs, Limits.of(cluster)
        ).group()
        with Supervisor(tracker.events, cluster.silent_after_s, tracker.display.message) as supervisor:
            supervisor.watch([group], reservation)
            yield group
    finally:
        reservation.release()


def ranks(group: ActorGroup[Any]) -> list[Rank]:
    """A place in one process group for every replica."""
    address, port = meeting_point(group)
    return [Rank(rank, len(group), address, port) for rank in range(len(group))]
