"""The replicas of a role as one group: started together, built together, and each asked by the role's own methods.

`replica.ask(Role.method, argument)` is a call that an editor, mypy and a reader can follow into the role: arguments
have the types of the method's, or are `Deferred` values of these types, and the answer has the type that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.rollout import Shipped
from rlhf_ray.runtime.answers import Answer, Deferred, Stored, collect
from rlhf_ray.runtime.role_host import Activity, RoleHost

CONTROL, BESIDE = "control", "beside"
"""Threads of an actor beside those that do its work: for the runtime's own questions, and for `Replica.beside`."""

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
class Deadlines:
    """How long roles may take."""

    start_s: float
    call_s: float


@dataclass(frozen=True)
class Replica(Generic[R]):
    """One process of a role.

    Attributes:
        name: role and number, `generator-1`.
        node: address of the node it runs on.
        host: the actor around the role.
        group: the threads that calls are served by; empty: the role's own, in the order asked.
    """

    name: str
    node: str
    host: Any
    group: str | None = None

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

    def _in_group(self, method: Any, **options: Any) -> Any:
        if self.group is not None:
            options["concurrency_group"] = self.group
        return method.options(**options) if options else method


class ActorGroup(Generic[R]):
    """Replicas of one role."""

    def __init__(self, role: str, replicas: Sequence[Replica[R]], deadlines: Deadlines) -> None:
        self.role = role
        self.replicas = list(replicas)
        self._deadlines = deadlines

    @classmethod
    def start(
        cls,
        role: str,
        settings: ActorSettings,
        group: PlacementGroup,
        first_bundle: int,
        logs: Path,
        deadlines: Deadlines,
    ) -> ActorGroup[Any]:
        """Start the processes; the roles in them are made by `build`.

        Args:
            first_bundle: where this role's bundles begin in the placement group.
        """
        hosts = []
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
            }
            host = (
                ray.remote(concurrency_groups={CONTROL: 1, BESIDE: 1})(RoleHost)
                .options(**options)
                .remote(name, str(logs.absolute() / f"{name}.log"), settings.threads, deadlines.call_s)
            )
            hosts.append((name, host))
        nodes: list[str] = collect(
            [Answer(host.node.remote(), name, "?", "start") for name, host in hosts], deadlines.start_s
        )
        return cls(
            role, [Replica(name, node, host) for (name, host), node in zip(hosts, nodes, strict=True)], deadlines
        )

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
        collect(self.build(*roles), self._deadlines.start_s)

    @overload
    def call_all(self, method: Callable[[R], T], /) -> list[T]: ...
    @overload
    def call_all(self, method: Callable[[R, A], T], a: A | Deferred[A], /) -> list[T]: ...
    @overload
    def call_all(self, method: Callable[[R, A, B], T], a: A | Deferred[A], b: B | Deferred[B], /) -> list[T]: ...
    def call_all(self, method: Callable[..., Any], /, *args: Any) -> list[Any]:
        """Ask all replicas the same and wait for all."""
        return self.wait([replica.ask(method, *args) for replica in self])

    def wait(self, answers: Sequence[Answer[T]]) -> list[T]:
        """Wait with this group's deadline."""
        return collect(answers, self._deadlines.call_s)


def meeting_point(group: ActorGroup[Any]) -> tuple[str, int]:
    """Address and free port on the first replica's node, for a process group."""
    first = group.replicas[0]
    asked: Answer[int] = Answer(first.host.free_port.remote(), first.name, first.node, "finding a port")
    [port] = collect([asked], 60.0)
    return first.node, port


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
