"""Actor groups for the length of a block, with the room they took given back, and what a run would track of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.runtime.actor_group import ActorGroup, Launched
from rlhf_ray.runtime.cluster import RoleRequest, reserve
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.tracking.tracker import Tracker, open_folder
from tests.making import unread_config


@contextmanager
def tracked(runs: Path) -> Iterator[Tracker]:
    """The tracker of a run that reads nothing."""
    config = unread_config(runs, every_steps=1)
    with open_folder(config) as folder, Tracker(config, "sft", folder, "a run", 0, ()) as tracker:
        yield tracker


@contextmanager
def started(
    logs: Path,
    roles: dict[str, ActorSettings],
    limits: Limits = Limits(start_s=280, call_s=120),
    remakes: Mapping[str, Callable[[], Any]] | None = None,
) -> Iterator[list[ActorGroup[Any]]]:
    """Empty processes of some roles; they end with the block.

    Args:
        remakes: constructors of those that Ray may start again.
    """
    requests = [RoleRequest(role, role, settings) for role, settings in roles.items()]
    reservation = reserve(requests, ClusterSettings(placement_timeout_s=60))
    try:
        groups = []
        first_bundle = 0
        for role, settings in roles.items():
            remake = (remakes or {}).get(role)
            launched = Launched.of(role, settings, reservation.group, first_bundle, logs, limits, remake)
            groups.append(launched.group())
            first_bundle += settings.replicas
        yield groups
    finally:
        reservation.release()
