"""The replicas of a role as one group: started together, built together, and each asked by the role's own methods.

`replica.ask(Role.method, argument)` is a call that an editor, mypy and a reader can follow into the role: arguments
have the types of the method's, or are `Deferred` values of these types, and the answer has the type that it returns.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import psutil
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.failures import RoleFailure
from rlhf_ray.rollout import Shipped
from rlhf_ray.runtime.answers import Answer, Deferred, Stored, collect
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.runtime.role_host import Activity, Place, RoleHost
from rlhf_ray.runtime.vitals import Pulse

CONTROL, BESIDE = "control", "beside"
"""Threads of an actor beside those that do its work: for the runtime's own questions, and for `Replica.beside`."""

_ON_NODE_S = 30.0
_ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Calls run in threads, each of which glibc would give a heap of its own, and large tensors end up between them: half a
gigabyte of a generator with SmolLM2."""

R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound=Shipped)
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@dataclass(frozen=True)
class Replica(Generic[R]):
    """One process of a role.

    Attributes:
        name: role and number, `generator-1`.
        place: where it runs; of its first process, where Ray may start it again.
        host: the actor around the role.
        group: the threads that calls are served by; empty: the role's own, in the order asked.
    """

    name: str
    place: Place
    host: Any
    group: str | None = None

    @property
    def node(self) -> str:
        """Address of its node."""
        return self.place.node

    @overload
    def ask(self, method: Callable[[R], T], /) -> Answer[T]: ...
    @overload
    def ask(self, method: Callable[[R, A], T], a: A | Deferred[A], /) -> Answer[T]: ...
    @overload
    def ask(self, method: Callable[[R, A, B], T], a: A | Deferred[A], b: B | Deferred[B], /) -> Answer[T]: ...
    @overload
    def ask(
        self,
        method: Callable[[R, A, B, C], T],
        a: A | Deferred[A],
        b: B | Deferred[B],
        c: C | Deferred[C],
        /,
    ) -> Answer[T]: ...
    @overload
    def ask(
        self,
        method: Callable[[R, A, B, C, D], T],
        a: A | Deferred[A],
        b: B | Deferred[B],
        c: C | Deferred[C],
        d: D | Deferred[D],
        /,
    ) -> Answer[T]: ...
    def ask(self, method: Callable[..., Any], /, *args: Any) -> Answer[Any]:
        """Call one of the role's methods; returns at once."""
        reference = self._in_group(self.host.call).remote(method.__name__, *args)
        return Answer(reference, self.name, self.node, method.__name__)

    @overload
    def keep(self, method: Callable[[R, A], S], a: A | Deferred[A], /) -> Stored[S]: ...
    @overload
    def keep(self, method: Callable[[R, A, B], S], a: A | Deferred[A], b: B | Deferred[B], /) -> Stored[S]: ...
    def keep(self, method: Callable[..., Any], /, *args: Any) -> Stored[Any]:
        """As `ask`, for rows and columns: they stay in the object store, and their header comes apart from them."""
        name = method.__name__
        data, header = self._in_group(self.host.keep, num_returns=2).remote(name, *args)
        return Stored(Answer(data, self.name, self.node, name), Answer(header, self.name, self.node, name))

    @property
    def beside(self) -> Replica[R]:
        """The same process, asked in a thread of its own: a call does not wait for those that were asked before it.

        For methods that may run at the same time as others of the role.
        """
        return replace(self, group=BESIDE)

    def activity(self) -> Answer[Activity]:
        """What the process did since this was last asked; answered whatever it is doing."""
        asked = self.host.activity.options(concurrency_group=CONTROL).remote()
        return Answer(asked, self.name, self.node, "activity")

    def pulse(self) -> Answer[Pulse]:
        """Signs of life of the process that there is now."""
        asked = self.host.pulse.options(concurrency_group=CONTROL, max_task_retries=0).remote()
        return Answer(asked, self.name, self.node, "pulse")

    def _in_group(self, method: Any, **options: Any) -> Any:
        if self.group is not None:
            options["concurrency_group"] = self.group
        return method.options(**options) if options else method


class ActorGroup(Generic[R]):
    """Replicas of one role.

    Args:
        role: its name.
        replicas: its processes.
        limits: how long they may take.
        restarts: whether Ray starts a lost process again, and gives it the calls that it owes.
    """

    def __init__(self, role: str, replicas: Sequence[Replica[R]], limits: Limits, restarts: bool = False) -> None:
        self.role = role
        self.replicas = list(replicas)
        self.limits = limits
        self.restarts = restarts and limits.max_restarts > 0

    def end(self) -> None:
        """End every process at once, whatever it is doing, and for good."""
        for replica in self:
            ray.kill(replica.host)
            if not self.restarts:
                # A stopped process does not hear Ray.
                end_process(replica.place)

    def __len__(self) -> int:
        return len(self.replicas)

    def __iter__(self) -> Iterator[Replica[R]]:
        return iter(self.replicas)

    def of(self, index: int) -> Replica[R]:
        """The replica whose turn it is: work is dealt out by its place, never by who is free first."""
        return self.replicas[index % len(self.replicas)]

    def build(self, *roles: Callable[[], R]) -> list[Answer[None]]:
        """Begin to build the role in every process; `collect` the answers.

        Args:
            roles: a constructor with its arguments for each process, or one for all of them.
        """
        each = roles * len(self) if len(roles) == 1 else roles
        return [
            Answer(replica.host.build.remote(role), replica.name, replica.node, "loading its model")
            for replica, role in zip(self.replicas, each, strict=True)
        ]

    def build_all(self, *roles: Callable[[], R]) -> None:
        """Build the role in every process and wait until all have it."""
        collect(self.build(*roles), self.limits.start_s)

    @overload
    def call_all(self, method: Callable[[R], T], /) -> list[T]: ...
    @overload
    def call_all(self, method: Callable[[R, A], T], a: A | Deferred[A], /) -> list[T]: ...
    @overload
    def call_all(self, method: Callable[[R, A, B], T], a: A | Deferred[A], b: B | Deferred[B], /) -> list[T]: ...
    def call_all(self, method: Callable[..., Any], /, *args: Any) -> list[Any]:
        """Ask all replicas the same and wait for all."""
        return self.wait(self.ask_all(method, *args))

    def ask_all(self, method: Callable[..., T], /, *args: Any) -> list[Answer[T]]:
        """Ask all replicas the same; returns at once."""
        return [replica.ask(method, *args) for replica in self]

    def wait(self, answers: Sequence[Answer[T]]) -> list[T]:
        """Wait with this group's deadline."""
        return collect(answers, self.limits.call_s)


@dataclass(frozen=True)
class Launched:
    """The processes of a role on their way: they load Python and the engines' libraries, which takes seconds.

    Attributes:
        role: its name.
        hosts: actors by name.
        places: what each says once it is there.
        limits, restarts: see `ActorGroup`.
    """

    role: str
    hosts: dict[str, Any]
    places: list[Answer[Place]]
    limits: Limits
    restarts: bool

    @classmethod
    def of(
        cls,
        role: str,
        settings: ActorSettings,
        group: PlacementGroup,
        first_bundle: int,
        logs: Path,
        limits: Limits,
        remake: Callable[[], Any] | None = None,
    ) -> Launched:
        """Begin to start the processes; the roles in them are made by `ActorGroup.build`.

        Args:
            first_bundle: where this role's bundles begin in the placement group.
            remake: constructor of a role that keeps nothing between calls: a lost process is started again by Ray, and
                the references to what it owes are fulfilled by the second attempt.
        """
        restarts = remake is not None and limits.max_restarts > 0
        hosts = {}
        for number in range(settings.replicas):
            name = f"{role}-{number}"
            options = {
                "num_cpus": settings.cpus,
                "num_gpus": settings.gpus,
                "max_concurrency": settings.concurrent_calls,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=first_bundle + number
                ),
                "runtime_env": {"env_vars": {**_ONE_HEAP, **environment(settings)}},
                # The process itself counts its restarts, in a window of time.
                **({"max_restarts": -1, "max_task_retries": -1} if restarts else {}),
            }
            arguments = name, str(logs.absolute() / f"{name}.log"), settings.threads, limits
            # A learner's calls come one after the other, and it would hold a step's shards for longer.
            overlapping = remake is not None or settings.concurrent_calls > 1
            hosts[name] = (
                ray.remote(concurrency_groups={CONTROL: 1, BESIDE: 1})(RoleHost)
                .options(**options)
                .remote(*arguments, remake if restarts else None, overlapping)
            )
        places: list[Answer[Place]] = [Answer(host.place.remote(), name, "?", "start") for name, host in hosts.items()]
        return cls(role, hosts, places, limits, restarts)

    def group(self) -> ActorGroup[Any]:
        """The processes once all are there.

        Raises:
            RoleFailure: of one that does not come up. All are ended.
        """
        try:
            places = collect(self.places, self.limits.start_s)
        except RoleFailure:
            for host in self.hosts.values():
                ray.kill(host)
            raise
        replicas: list[Replica[Any]] = [
            Replica(name, place, host) for (name, host), place in zip(self.hosts.items(), places, strict=True)
        ]
        return ActorGroup(self.role, replicas, self.limits, self.restarts)


def meeting_point(group: ActorGroup[Any]) -> tuple[str, int]:
    """Address and free port on the first replica's node, for a process group."""
    first = group.replicas[0]
    asked: Answer[int] = Answer(first.host.free_port.remote(), first.name, first.node, "finding a port")
    [port] = collect([asked], 60.0)
    return first.node, port


def end_process(place: Place) -> None:
    """SIGKILL, on the node of the process."""
    _on_node(place, _kill)


def core_seconds(place: Place) -> float | None:
    """Processor time that the process has used; None where there is no such process any more."""
    used: float | None = _on_node(place, _used)
    return used


def _on_node(place: Place, action: Callable[[int], Any]) -> Any:
    """Run a function of the process id on its node; None where the node is gone."""
    if place.node_id == ray.get_runtime_context().get_node_id():
        return action(place.pid)
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(action).remote(place.pid)
    try:
        return ray.get(asked, timeout=_ON_NODE_S)
    except ray.exceptions.RayError:
        return None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _used(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return None
    return float(times.user + times.system)


def environment(settings: ActorSettings) -> dict[str, str]:
    """A role's environment. Thread pools are sized before any library is loaded: two threads on a busy core spin."""
    threads = str(settings.threads)
    return {
        "MALLOC_MMAP_THRESHOLD_": str(settings.kept_block_bytes),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Byte code is kept, or every process compiles the engines' sources again when it imports them.
        "PYTHONDONTWRITEBYTECODE": "",
        **settings.env,
    }
