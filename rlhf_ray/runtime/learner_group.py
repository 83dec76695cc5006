"""A run that is one learner group: supervised training and reward-model training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.roles.deepspeed_engine import Rank
from rlhf_ray.runtime.actor_group import ActorGroup, Deadlines, meeting_point
from rlhf_ray.runtime.cluster import RoleRequest, check_resources, connect, reserve
from rlhf_ray.runtime.waiting import collect


@contextmanager
def connected(cluster: ClusterSettings, request: RoleRequest) -> Iterator[None]:
    """A cluster that could hold the learner, for the length of a block."""
    connect(cluster)
    try:
        check_resources([request])
        yield
    finally:
        ray.shutdown()


def start_learners(
    request: RoleRequest,
    cluster: ClusterSettings,
    logs: Path,
    role: Callable[..., Any],
    arguments: Callable[[Rank], tuple[Any, ...]],
) -> ActorGroup:
    """All ranks of one learner, with their model loaded.

    Args:
        role: the learner's class.
        arguments: of its constructor, for each rank.
    """
    deadlines = Deadlines(cluster.start_timeout_s, cluster.call_timeout_s)
    placement = reserve([request], cluster)
    group = ActorGroup.start(request.role, request.settings, placement, 0, logs, deadlines)
    collect(group.build(role, [arguments(rank) for rank in ranks(group)]), deadlines.start_s)
    return group


def ranks(group: ActorGroup) -> list[Rank]:
    """A place in one process group for every replica."""
    address, port = meeting_point(group)
    return [Rank(rank, len(group), address, port) for rank in range(len(group))]
