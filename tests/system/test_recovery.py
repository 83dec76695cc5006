"""Processes that die, stop or hang, and what comes of the answers that they owe."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.rollout import Rollout
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import collect
from rlhf_ray.runtime.limits import Limits
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.tracking.logs import EventLog, read_log
from rlhf_ray.waiting import waiting
from tests.making import random_rollout
from tests.system.commands import wait_until
from tests.system.groups import started

SETTINGS = ActorSettings(cpus=0.25, threads=1)
LIMITS = Limits(start_s=280, call_s=120, max_restarts=2, restart_window_s=3600)
SILENT_S = 4.0


class Worker:
    """A role that is asked to do harm to its process, but only once, while `mark` is not there."""

    def sample(self, index: int, mark: str = "") -> Rollout:
        _once(mark, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return random_rollout(index)

    def set_aside(self, *inputs: Any) -> str:
        return f"set aside: {inputs[-1]}"

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exhaust(self, mark: str) -> int:
        _once(mark, _run_out_of_memory)
        return os.getpid()

    def stop(self, mark: str) -> int:
        _once(mark, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        return os.getpid()

    def hang(self, mark: str) -> int:
        _once(mark, lambda: threading.Event().wait(600))
        return os.getpid()

    def wait_for_others(self, seconds: float) -> int:
        with waiting():
            threading.Event().wait(seconds)
        return os.getpid()


def _once(mark: str, harm: Any) -> None:
    if mark and not Path(mark).exists():
        Path(mark).touch()
        harm()


def _run_out_of_memory() -> None:
    raise MemoryError("none left")


@contextmanager
def working(logs: Path, *, replicas: int = 1, restarts: bool = True) -> Iterator[ActorGroup[Worker]]:
    settings = SETTINGS.model_copy(update={"replicas": replicas})
    remakes = {"worker": Worker} if restarts else {}
    with started(logs, {"worker": settings}, LIMITS, remakes) as [group]:
        group.build_all(Worker)
        yield group


@pytest.fixture
def worker(local_ray: Path, tmp_path: Path) -> Iterator[ActorGroup[Worker]]:
    """One process that Ray may start again."""
    with working(tmp_path) as group:
        yield group


@contextmanager
def supervised(group: ActorGroup[Worker], log: EventLog) -> Iterator[list[str]]:
    """Watched for the length of a block; gives what is said to whoever looks at the run."""
    said: list[str] = []
    with Supervisor(log, SILENT_S, said.append) as supervisor:
        supervisor.watch([group])
        yield said


def pid_of(group: ActorGroup[Worker]) -> int:
    return group.wait([group.of(0).ask(Worker.pid)])[0]


def events_of(log: EventLog, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(log.path) if event["kind"] == kind]


def test_a_reference_that_somebody_holds_is_fulfilled_by_the_second_attempt(worker: ActorGroup[Worker], tmp_path: Path):
    before = pid_of(worker)
    asked = [
        worker.of(0).keep(Worker.sample, index, str(tmp_path / "mark") if index == 1 else "") for index in range(3)
    ]
    headers = worker.wait([each.header for each in asked])
    assert [header.num_samples for header in headers] == [4, 4, 4]
    assert pid_of(worker) != before
    [rollout] = worker.wait([asked[1].data])
    assert (rollout.tokens == random_rollout(1).tokens).all()


def test_a_process_without_memory_gives_its_work_to_another(worker: ActorGroup[Worker], tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    before = pid_of(worker)
    with supervised(worker, log):
        assert worker.wait([worker.of(0).ask(Worker.exhaust, str(tmp_path / "mark"))]) != [before]
        [event] = wait_until(lambda: events_of(log, "role_restarted"), 60, "the event")
    assert (event["role"], event["attempt"]) == ("worker-0", 2)
    assert event["cause"] == "exhaust: MemoryError: none left"


def test_an_input_that_ends_two_processes_is_set_aside(worker: ActorGroup[Worker]):
    before = pid_of(worker)
    answers: list[Any] = [worker.of(0).ask(Worker.die), worker.of(0).ask(Worker.pid)]
    died, after = worker.wait(answers)
    assert died == "set aside: its process ended 2 times while it was at this shard"
    assert after != before


def test_who_is_lost_too_often_ends_the_run(worker: ActorGroup[Worker]):
    def kill_and_ask() -> None:
        os.kill(pid_of(worker), signal.SIGKILL)
        pid_of(worker)

    kill_and_ask()
    kill_and_ask()
    with pytest.raises(RoleFailure, match=r"ended 3 times within 3600 s; cluster.max_restarts allows 2") as caught:
        kill_and_ask()
    assert (caught.value.kind, caught.value.role) == (FailureKind.INFRASTRUCTURE, "worker-0")


@pytest.mark.parametrize("harm", [Worker.stop, Worker.hang])
def test_alive_but_silent_is_as_dead_as_gone(worker: ActorGroup[Worker], tmp_path: Path, harm: Any):
    log = EventLog(tmp_path / "events.jsonl")
    before = pid_of(worker)
    with supervised(worker, log) as said:
        [after] = collect([worker.of(0).ask(harm, str(tmp_path / "mark"))], 60)
        assert after != before
        wait_until(lambda: events_of(log, "role_restarted"), 60, "the event")
    [silent] = events_of(log, "role_silent")
    assert silent["role"] == "worker-0"
    assert log.count("role_silent") == EventLog(tmp_path / "events.jsonl").count("role_silent") == 1
    assert re.match(r"worker-0 on \S+ is silent \(.*\): ended after \d+ s", said[0])
    assert re.fullmatch(r"worker-0 is back on \S+ after \d+ s", said[-1])
    assert SILENT_S <= silent["seconds"] <= 3 * SILENT_S


def test_who_waits_for_others_is_left_alone(worker: ActorGroup[Worker], tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    before = pid_of(worker)
    with supervised(worker, log):
        assert worker.wait([worker.of(0).ask(Worker.wait_for_others, 2.5 * SILENT_S)]) == [before]
    assert read_log(log.path) == []


def test_a_rank_that_is_lost_is_not_started_again_and_its_group_can_be_ended(local_ray: Path, tmp_path: Path):
    with working(tmp_path, replicas=2, restarts=False) as group:
        pids = group.call_all(Worker.pid)
        os.kill(pids[1], signal.SIGSTOP)
        with pytest.raises(RoleFailure, match="went away during 'die'"):
            group.wait([group.of(0).ask(Worker.die)])
        group.end()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30, "the end of both")
        with pytest.raises(RoleFailure, match="went away"):
            group.wait([group.of(1).ask(Worker.pid)])


def test_an_object_outlives_the_process_that_made_it(worker: ActorGroup[Worker]):
    kept = worker.of(0).keep(Worker.sample, 7)
    worker.wait([kept.header])
    ray.kill(worker.of(0).host, no_restart=False)
    [rollout] = worker.wait([kept.data])
    assert (rollout.tokens == random_rollout(7).tokens).all()
