"""Roles as Ray actors: how they are asked, how they fail, and what the cluster says when there is no room."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure
from rlhf_ray.ppo.metrics import StepClock
from rlhf_ray.rollout import Rollout, TokenColumn, refuse_rollouts_in_this_process
from rlhf_ray.runtime.actor_group import ActorGroup, meeting_point
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, OneByOne, collect
from rlhf_ray.runtime.cluster import RoleRequest, check_resources, cluster_nodes, reserve
from rlhf_ray.runtime.learner_group import role_group
from rlhf_ray.tracking.logs import read_log
from tests.making import random_rollout
from tests.system.commands import wait_until
from tests.system.groups import started, tracked

SETTINGS = ActorSettings(replicas=2, cpus=0.25, threads=1, env={"FAVOURITE": "amber"})


@dataclass(frozen=True)
class Pairing:
    """A rollout and a column of it."""

    rollout: Rollout
    column: TokenColumn


class Player:
    """A role for these tests: it answers, yields, waits and fails as it is told."""

    def __init__(self, number: int) -> None:
        if number < 0:
            raise BadInput("number", str(number), "0 or more")
        self.number = number

    def whoami(self) -> tuple[int, int]:
        return self.number, os.getpid()

    def environment(self) -> dict[str, str]:
        import torch

        print("spoken on stdout")
        os.system("echo spoken by a child")
        return {**os.environ, "torch threads": str(torch.get_num_threads())}

    def sample(self, index: int) -> Rollout:
        return random_rollout(index)

    def column(self, rollout: Rollout) -> TokenColumn:
        return TokenColumn(rollout.logprobs * 2)

    def paired(self, pairs: Sequence[Pairing]) -> list[float]:
        assert all(type(pair.rollout) is Rollout for pair in pairs)
        return [float(pair.column.data.sum() / pair.rollout.logprobs.sum()) for pair in pairs]

    def lengths(self, rollouts: Iterable[Rollout]) -> list[int]:
        assert iter(rollouts) is not iter(rollouts), "each iteration fetches anew, and one is held at a time"
        return [len(rollout.logprobs) for rollout in rollouts]

    def wait(self, seconds: float) -> str:
        threading.Event().wait(seconds)
        return "done"

    def fail(self, how: str) -> None:
        errors: dict[str, Exception] = {
            "value": ValueError("the first line\nthe second"),
            "data": RoleFailure(FailureKind.DATA, "player", "?", "this sample is broken"),
            "connection": ConnectionResetError("the other side went away"),
            "silent": KeyError(),
        }
        raise errors[how]


@contextmanager
def playing(logs: Path, settings: ActorSettings, role: str = "player") -> Iterator[ActorGroup[Player]]:
    """Players in processes of their own, numbered through."""
    with started(logs, {role: settings}) as [group]:
        collect(group.build(*(partial(Player, number) for number in range(settings.replicas))), 120)
        yield group


@pytest.fixture(scope="module")
def players(local_ray: Path) -> Iterator[ActorGroup[Player]]:
    """Two replicas."""
    with playing(local_ray, SETTINGS) as group:
        yield group


def test_a_busy_process_answers_the_runtime_and_what_is_asked_beside(players: ActorGroup[Player]):
    [player, _] = players
    busy = [player.ask(Player.wait, 3.0), player.ask(Player.column, player.keep(Player.sample, 1).data)]
    asked = time.monotonic()
    [activity] = collect([player.activity()], 30)
    assert activity.cpu_s >= 0
    assert collect([player.beside.ask(Player.whoami)], 30)[0][0] == 0
    assert time.monotonic() - asked < 2.5
    assert collect(busy[:1], 30) == ["done"]


def failure_of(answer: Answer[Any], timeout_s: float = 30) -> RoleFailure:
    with pytest.raises(RoleFailure) as caught:
        collect([answer], timeout_s)
    return caught.value


def environment_of(group: ActorGroup[Player]) -> dict[str, str]:
    return collect([group.of(0).ask(Player.environment)], 60)[0]


def test_replicas_are_processes_of_their_own(players: ActorGroup[Player]):
    answers = players.call_all(Player.whoami)
    assert [number for number, _ in answers] == [0, 1]
    assert len({os.getpid(), *(pid for _, pid in answers)}) == 3
    assert [replica.name for replica in players] == ["player-0", "player-1"]
    address, port = meeting_point(players)
    assert address == players.replicas[0].node
    assert 1024 <= port < 65536


def test_a_process_has_its_threads_its_environment_and_its_log(players: ActorGroup[Player], local_ray: Path):
    environment = environment_of(players)
    assert environment["torch threads"] == environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"
    assert environment["FAVOURITE"] == "amber"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    log = (local_ray / "player-0.log").read_text()
    assert "spoken by a child" in log


def test_a_process_that_falls_silent_is_ended_and_its_call_told(local_ray: Path):
    """In the commands that have one role after the other, too."""
    request = RoleRequest("watched", "watched", SETTINGS)
    cluster = ClusterSettings(placement_timeout_s=60, silent_after_s=10)
    with tracked(local_ray / "runs") as tracker:
        with role_group(request, cluster, tracker) as group:
            group.build_all(*(partial(Player, number) for number in range(2)))
            [(_, _), (_, pid)] = group.call_all(Player.whoami)
            unanswered = group.of(1).ask(Player.wait, 200.0)
            os.kill(pid, signal.SIGSTOP)
            failure = failure_of(unanswered, 60)
        told = [(event["kind"], event["role"]) for event in read_log(tracker.events.path) if "role" in event]
    assert (failure.role, failure.kind) == ("watched-1", FailureKind.INFRASTRUCTURE)
    assert ("role_silent", "watched-1") in told
    wait_until(lambda: not psutil.pid_exists(pid), 30, "the end of the silent process")


def test_threads_are_the_settings(local_ray: Path):
    with playing(local_ray, ActorSettings(threads=2), role="threaded") as group:
        environment = environment_of(group)
    assert environment["torch threads"] == environment["OMP_NUM_THREADS"] == "2"


def test_references_are_fetched_where_they_are_used(players: ActorGroup[Player]):
    """The driver of this test could not read what it hands around."""
    refuse_rollouts_in_this_process()
    try:
        asked = [players.of(index).keep(Player.sample, index) for index in range(3)]
        headers = players.wait([stored.header for stored in asked])
        assert [header.num_samples for header in headers] == [4, 4, 4]
        with pytest.raises(
            RoleFailure, match="the answer to 'sample' cannot be read: RolloutFetchedByDriver"
        ) as caught:
            players.wait([asked[0].data])
        assert caught.value.kind is FailureKind.FATAL

        columns = [players.of(1).keep(Player.column, stored.data) for stored in asked]
        assert players.wait([column.header for column in columns]) == [header.num_response_tokens for header in headers]
        pairs = AllOf(
            tuple(
                Assembly(Pairing, {"rollout": stored.data, "column": column.data})
                for stored, column in zip(asked, columns, strict=True)
            )
        )
        assert players.wait([players.of(0).ask(Player.paired, pairs)])[0] == pytest.approx([2.0] * 3)
        in_turn = OneByOne(tuple(stored.data for stored in asked))
        assert players.wait([players.of(1).ask(Player.lengths, in_turn)])[0] == [h.num_response_tokens for h in headers]
    finally:
        refuse_rollouts_in_this_process(False)


def test_a_process_says_when_it_was_busy(players: ActorGroup[Player]):
    [first, _] = players
    players.wait([first.activity()])
    players.wait([first.ask(Player.wait, 0.3), first.ask(Player.whoami)])
    [activity] = players.wait([first.activity()])
    waited, asked = activity.spans
    assert (waited.task, asked.task) == ("wait", "whoami")
    assert waited.duration_s >= 0.3
    assert asked.duration_s >= 0
    assert asked.start_s - waited.start_s >= 0.3
    assert 0 <= waited.cpu_s < 0.3, "a process that waits uses no core"
    assert 0 < activity.cpu_s < 0.5
    assert players.wait([first.activity()])[0].spans == ()


@pytest.mark.parametrize(
    ("how", "kind", "cause"),
    [
        ("value", FailureKind.FATAL, "ValueError: the first line"),
        ("data", FailureKind.DATA, "this sample is broken"),
        ("connection", FailureKind.INFRASTRUCTURE, "ConnectionResetError: the other side went away"),
        ("silent", FailureKind.FATAL, "KeyError: no message"),
    ],
)
def test_an_exception_is_classified_where_it_happens(
    players: ActorGroup[Player], how: str, kind: FailureKind, cause: str
):
    failure = failure_of(players.of(1).ask(Player.fail, how))
    assert (failure.kind, failure.role, failure.cause) == (kind, "player-1", cause)
    assert failure.node == players.replicas[1].node
    assert "in fail" in failure.details, "the traceback of the far side is kept"


@pytest.mark.parametrize("nested", [False, True])
def test_a_failure_keeps_the_name_of_the_role_that_had_it(players: ActorGroup[Player], nested: bool):
    broken = players.of(0).ask(Player.fail, "data")
    asked = (
        players.of(1).ask(Player.paired, AllOf((Assembly(Pairing, {"rollout": broken}),)))
        if nested
        else players.of(1).ask(Player.column, broken)
    )
    failure = failure_of(asked)
    assert (failure.kind, failure.role) == (FailureKind.DATA, "player-0")
    assert failure.cause == "this sample is broken"


def test_a_role_that_cannot_be_made_says_why(local_ray: Path):
    with (
        started(local_ray, {"other": ActorSettings()}) as [group],
        pytest.raises(RoleFailure, match=r"other-0 on .*BadInput: number: -1; 0 or more"),
    ):
        collect(group.build(partial(Player, -1)), 120)


def test_a_late_answer_names_role_and_task(players: ActorGroup[Player]):
    began = time.monotonic()
    failure = failure_of(players.of(1).ask(Player.wait, 3.0), timeout_s=0.5)
    assert time.monotonic() - began < 2.5
    assert failure.kind is FailureKind.INFRASTRUCTURE
    assert failure.role == "player-1"
    assert "player-1 (wait)" in failure.cause
    assert players.wait([players.of(1).ask(Player.whoami)])[0][0] == 1, "the role itself is well"


def test_the_first_failure_ends_the_wait(players: ActorGroup[Player]):
    began = time.monotonic()
    answers: list[Answer[Any]] = [players.of(0).ask(Player.wait, 5.0), players.of(1).ask(Player.fail, "value")]
    with pytest.raises(RoleFailure, match="player-1"):
        collect(answers, 60)
    assert time.monotonic() - began < 4


def test_a_step_ends_with_the_first_failure_of_any_phase(players: ActorGroup[Player]):
    """A critic that dies is not noticed only when generation has ended."""
    began = time.monotonic()
    phases = {"generate": [players.of(0).ask(Player.wait, 5.0)], "values": [players.of(1).ask(Player.fail, "value")]}
    with pytest.raises(RoleFailure, match="player-1"):
        StepClock(60).wait(phases)
    assert time.monotonic() - began < 4


def test_phases_add_up_to_the_wait(players: ActorGroup[Player]):
    clock = StepClock(60)
    slow, fast = players.of(0).ask(Player.wait, 0.6), players.of(1).ask(Player.wait, 0.3)
    values = clock.wait({"generate": [slow], "reward": [fast], "reference": []})
    assert values == {"generate": ["done"], "reward": ["done"], "reference": []}
    assert clock.phases["time/generate_s"] >= 0.5
    assert clock.phases["time/reward_s"] == clock.phases["time/reference_s"] == 0, "it was there when it was waited for"
    assert sum(clock.phases.values()) <= clock.step_s


def test_a_killed_actor_is_noticed_at_once(local_ray: Path):
    with playing(local_ray, ActorSettings(), role="victim") as group:
        waiting = group.of(0).ask(Player.wait, 60.0)
        began = time.monotonic()
        ray.kill(group.replicas[0].host)
        with pytest.raises(RoleFailure) as caught:
            collect([waiting], 60)
        assert time.monotonic() - began < 15
        assert (caught.value.kind, caught.value.role) == (FailureKind.INFRASTRUCTURE, "victim-0")
        assert "went away during 'wait'" in caught.value.cause
        with pytest.raises(RoleFailure, match="victim-0"):
            group.call_all(Player.whoami)


def test_no_room_is_said_in_time_with_what_was_asked(local_ray: Path):
    request = RoleRequest("generator", "generator", ActorSettings(replicas=3, cpus=1.5))
    with pytest.raises(RoleFailure) as caught:
        reserve([request], ClusterSettings(placement_timeout_s=0.5))
    message = str(caught.value)
    assert caught.value.kind is FailureKind.FATAL
    assert "generator: 3 x {'CPU': 1.5}" in message
    assert "free now: {'CPU': " in message
    assert "cluster.placement_timeout_s" in message


@pytest.mark.parametrize(
    ("settings", "where", "found"),
    [
        (ActorSettings(replicas=5, cpus=0.5), "generator.cpus", "2.75 CPUs (generator 2.5, reward 0.25)"),
        (ActorSettings(gpus=1), "generator.gpus", "1 GPUs (generator 1); the cluster has 0 on 1 node(s)"),
        (ActorSettings(threads=3), "generator.threads", "3 threads in one process; the largest node has 2 CPUs"),
    ],
)
def test_more_than_the_cluster_has_is_bad_input(local_ray: Path, settings: ActorSettings, where: str, found: str):
    requests = [RoleRequest("generator", "generator", settings), RoleRequest("reward", "reward", ActorSettings())]
    with pytest.raises(BadInput) as caught:
        check_resources(requests, cluster_nodes())
    assert caught.value.where == where
    assert found in caught.value.found


def test_a_process_must_fit_on_one_node(monkeypatch: pytest.MonkeyPatch):
    """Two nodes of a stand-in cluster have enough together, none alone."""
    nodes = [
        {"Alive": alive, "NodeManagerAddress": "?", "Resources": {"CPU": cpus}}
        for alive, cpus in ((True, 2.0), (True, 2.0), (False, 64.0))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    check_resources([RoleRequest("reward", "reward", ActorSettings(replicas=2, cpus=2.0))], cluster_nodes())
    with pytest.raises(BadInput, match=r"reward\.cpus: one process asks for 3 CPUs; the largest node has 2"):
        check_resources([RoleRequest("reward", "reward", ActorSettings(cpus=3.0))], cluster_nodes())
