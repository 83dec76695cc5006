"""Joining or starting a Ray cluster, and reserving room in it before any role starts."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure

_KNOCK_TIMEOUT_S = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class RoleRequest:
    """What a role asks of the cluster.

    Attributes:
        role: its name.
        key: where its settings are.
        settings: of its processes.
        shares_gpus_of: an earlier role with as many processes; each is in the bundle of one of these, on the same GPU.
    """

    role: str
    key: str
    settings: ActorSettings
    shares_gpus_of: str | None = None


@dataclass(frozen=True)
class Room:
    """Where the processes of all roles are placed.

    Attributes:
        bundles: of the placement group, in the order of the requests.
        first_bundle: where those of each role begin.
        settings: of each role's processes; of one that shares its GPU, half of it.
    """

    bundles: list[dict[str, float]]
    first_bundle: dict[str, int]
    settings: dict[str, ActorSettings]

    @classmethod
    def of(cls, requests: Sequence[RoleRequest]) -> Room:
        room = cls([], {}, {request.role: request.settings for request in requests})
        for request in requests:
            other = request.shares_gpus_of
            if other is None:
                room.first_bundle[request.role] = len(room.bundles)
                room.bundles.extend(_bundle(request.settings) for _ in range(request.settings.replicas))
                continue
            room.first_bundle[request.role] = first = room.first_bundle[other]
            for bundle in room.bundles[first : first + request.settings.replicas]:
                bundle["CPU"] += request.settings.cpus
            for role in (request.role, other):
                room.settings[role] = room.settings[role].model_copy(update={"gpus": request.settings.gpus / 2})
        return room


@dataclass(frozen=True)
class NodeShape:
    """What one node has.

    Attributes:
        address: of the node.
        cpus, gpus: that Ray hands out.
        object_store_bytes: shared memory for objects.
        memory_bytes: of the node in all; 0: not known.
        gpu_memory_bytes: of its smallest GPU; 0: not known.
    """

    address: str
    cpus: float
    gpus: float
    object_store_bytes: int
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0


def cluster_nodes() -> list[NodeShape]:
    """The nodes of the cluster that this process has joined, as Ray counts them."""
    return [
        NodeShape(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            int(node["Resources"].get("object_store_memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def cluster_address(settings: ClusterSettings) -> str | None:
    """The running cluster that the settings or `RAY_ADDRESS` name; None: a new one on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return address if address and address != "local" else None


def connect(settings: ClusterSettings) -> None:
    """Join the cluster of the settings or of `RAY_ADDRESS`, or start one on this machine.

    A cluster that is started here listens on loopback only, and asks for a token (Ray's default for such a cluster).

    Raises:
        BadInput: there is no such cluster.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    _keep_ray_off_the_terminal()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    joined = cluster_address(settings)
    # Without clusters of several machines, Ray takes loopback for this machine's address; otherwise it takes the
    # outward one (also where it is told 127.0.0.1), and listens on every interface.
    ray_constants.ENABLE_RAY_CLUSTER = joined is not None and joined.rpartition(":")[0] not in _LOOPBACK
    if joined is not None:
        try:
            _knock(joined)
            ray.init(address=joined, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise BadInput(
                "cluster.address",
                f"no Ray cluster answers at '{joined}' ({str(error).splitlines()[0]})",
                "the address of a running cluster (where it asks for a token: RAY_AUTH_MODE=token, and the token in "
                "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token), or empty for a new cluster on this machine",
            ) from None
        return
    ray.init(
        address="local",
        num_cpus=settings.num_cpus,
        object_store_memory=int(settings.object_store_gib * (1 << 30)),
        include_dashboard=False,
        **quiet,
    )
    # Ray makes it readable for everybody, and whoever has it runs code as this user.
    with suppress(OSError):
        Path("~/.ray/auth_token").expanduser().chmod(0o600)


def disconnect() -> None:
    """Leave the cluster, and end it if it was started here; the processes of this job end with that.

    Ray 2.60 writes a line of C++ to stderr for each call that is still under way, when the cluster's store is gone
    before it has told it so. They are in Ray's logs as well.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        ray.shutdown()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _keep_ray_off_the_terminal() -> None:
    """Ray 2.60 prints each call that it tries again, whatever `log_to_driver` says, and each failure that nobody asked
    for; our events tell of them."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, ignore_prefix: None


def _knock(address: str) -> None:
    """See that somebody listens. Ray itself would try for minutes, with a line in the terminal at each attempt.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def check_resources(requests: Sequence[RoleRequest], nodes: Sequence[NodeShape]) -> None:
    """See that the cluster could ever hold all roles.

    Raises:
        BadInput: naming the roles that ask for it, what they ask for in all and what there is.
    """
    for resource, attribute in (("CPU", "cpus"), ("GPU", "gpus")):
        amounts: list[float] = [getattr(node, attribute) for node in nodes]
        available, largest = sum(amounts), max(amounts, default=0.0)
        asked = {request.key: _amount(request, attribute) * request.settings.replicas for request in requests}
        total = sum(asked.values())
        parts = ", ".join(f"{key} {amount:g}" for key, amount in asked.items() if amount)
        heaviest = max(asked, key=lambda key: asked[key])
        if total > available + 1e-9:
            raise BadInput(
                f"{heaviest}.{attribute}",
                f"the roles ask for {total:g} {resource}s ({parts}); the cluster has {available:g} on {len(nodes)} "
                "node(s)",
                "fewer replicas or a smaller share each",
            )
        for request in requests:
            if _amount(request, attribute) > largest + 1e-9:
                raise BadInput(
                    f"{request.key}.{attribute}",
                    f"one process asks for {_amount(request, attribute):g} {resource}s; the largest node has "
                    f"{largest:g}",
                    "at most what one node has",
                )
    largest_cpu = max((node.cpus for node in nodes), default=0.0)
    for request in requests:
        if request.settings.threads > max(largest_cpu, 1.0):
            raise BadInput(
                f"{request.key}.threads",
                f"{request.settings.threads} threads in one process; the largest node has {largest_cpu:g} CPUs",
                "at most the CPUs of one node",
            )


@dataclass(frozen=True)
class Reservation:
    """Room for every process of every role. Where a node goes away, Ray looks for room elsewhere by itself.

    Attributes:
        group: Ray's placement group, with bundles in the order of the requests.
        requests: what was asked for.
        settings: of the cluster.
    """

    group: PlacementGroup
    requests: Sequence[RoleRequest]
    settings: ClusterSettings

    def wait(self) -> None:
        """Wait until there is room for all.

        Raises:
            RoleFailure: there is none within the deadline, although the cluster could hold them.
        """
        started = time.monotonic()
        if not self.group.wait(timeout_seconds=self.settings.placement_timeout_s):
            failure = self.no_room(time.monotonic() - started)
            self.release()
            raise failure

    def holds(self) -> bool:
        """Whether there is room for all now."""
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def no_room(self, seconds: float) -> RoleFailure:
        """What there is to say when there was not enough for so long."""
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        asked = "; ".join(
            f"{request.role}: {request.settings.replicas} x {_bundle(request.settings)}" for request in self.requests
        )
        return RoleFailure(
            FailureKind.FATAL,
            "cluster",
            "?",
            f"no room within {seconds:.0f} s (cluster.placement_timeout_s). Asked for {asked}; free now: "
            f"{free or 'nothing'}; placement {self.settings.placement_strategy}",
        )

    def release(self) -> None:
        """Give the room back; processes that are still in it end."""
        remove_placement_group(self.group)


def reserve(requests: Sequence[RoleRequest], settings: ClusterSettings) -> Reservation:
    """Room for every process of every role.

    Raises:
        RoleFailure: as `Reservation.wait`.
    """
    group = placement_group(Room.of(requests).bundles, strategy=settings.placement_strategy)
    reservation = Reservation(group, requests, settings)
    reservation.wait()
    return reservation


def _amount(request: RoleRequest, attribute: str) -> float:
    if attribute == "cpus":
        return request.settings.cpus
    return 0.0 if request.shares_gpus_of else request.settings.gpus


def _bundle(settings: ActorSettings) -> dict[str, float]:
    bundle = {"CPU": settings.cpus}
    if settings.gpus:
        bundle["GPU"] = settings.gpus
    return bundle
