"""Runs whose roles come one after the other: supervised training, reward-model training and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
def role_group(request: RoleRequest, cluster: ClusterSettings, logs: Path) -> Iterator[ActorGroup[Any]]:
    """The processes of one role, for the length of a block."""
    reservation = reserve([request], cluster)
    try:
        limits = Limits.of(cluster)
        yield Launched.of(request.role, request.settings, reservation.group, 0, logs, limits).group()
    finally:
        reservation.release()


def ranks(group: ActorGroup[Any]) -> list[Rank]:
    """A place in one process group for every replica."""
    address, port = meeting_point(group)
    return [Rank(rank, len(group), address, port) for rank in range(len(group))]
