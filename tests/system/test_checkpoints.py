"""Checkpoints are written beside the steps that follow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import Answer
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.logs import read_log
from rlhf_ray.tracking.manifest import find_fault
from tests.making import unread_config
from tests.system.commands import wait_until
from tests.system.groups import started

WORDS = b"of this writer"


@dataclass
class State:
    step: int = 0


class Writer:
    """Writes when it is let, or fails."""

    def save(self, folder: str, gate: str) -> None:
        wait_until(Path(gate).exists, 60, "the gate")
        if Path(gate).read_text() == "fail":
            raise RoleFailure(FailureKind.FATAL, "writer-0", "?", "cannot write")
        (Path(folder) / "weights").write_bytes(WORDS)


@pytest.fixture(scope="module")
def writers(local_ray: Path) -> Iterator[ActorGroup[Writer]]:
    with started(local_ray, {"writer": ActorSettings(cpus=0.25, threads=1)}) as [group]:
        group.build_all(Writer)
        yield group


def run_of(runs: Path, resume: bool = False) -> Run:
    config = unread_config(runs, every_steps=2)
    return Run(config, "sft", "x", 100, (), config.checkpoint, resume)


def take(run: Run, step: int, state: State, group: ActorGroup[Writer], gate: Path) -> None:
    def save(folder: str) -> list[Answer[None]]:
        return [group.of(0).ask(Writer.save, folder, str(gate))]

    state.step = step
    run.tracker.metrics.write({"step": step})
    run.keep(step, state, save)


def test_steps_go_on_while_a_checkpoint_is_written(writers: ActorGroup[Writer], tmp_path: Path):
    gate, state = tmp_path / "gate", State()
    with run_of(tmp_path) as run:
        for step in (1, 2, 3):
            take(run, step, state, writers, gate)
        assert run.folder.all_checkpoints()
        assert run.folder.latest_checkpoint() is None
        gate.touch()
        wait_until(run.folder.latest_checkpoint, 60, "the checkpoint")
        take(run, 4, state, writers, gate)
    [two, four] = [path for _, path in run.folder.complete_checkpoints()]
    assert (two / "weights").read_bytes() == WORDS
    assert find_fault(two) is None
    # The state is the one of the step, whatever it has become meanwhile; and the end of a run waits for the last one.
    assert [(path / "state.json").read_text() for path in (two, four)] == ['{"step": 2}\n', '{"step": 4}\n']
    saved = [row["step"] for row in read_log(run.folder.events) if row["kind"] == "checkpoint_saved"]
    assert saved == [2, 4]


def test_one_that_fails_ends_the_run_at_the_next_step(writers: ActorGroup[Writer], tmp_path: Path):
    gate, state = tmp_path / "gate", State()
    run = run_of(tmp_path)

    def go_on() -> None:
        take(run, 2, state, writers, gate)
        take(run, 3, state, writers, gate)
        gate.write_text("fail")
        take(run, 4, state, writers, gate)

    with pytest.raises(RoleFailure, match=r"writer-0 on .*: cannot write"), run:
        go_on()
    assert run.folder.latest_checkpoint() is None
    with run_of(tmp_path, resume=True) as again:
        assert again.restore(State) is None


def test_one_that_fails_after_something_else_did_is_an_event(writers: ActorGroup[Writer], tmp_path: Path):
    gate, state = tmp_path / "gate", State()
    run = run_of(tmp_path)

    def fail() -> None:
        take(run, 2, state, writers, gate)
        gate.write_text("fail")
        raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"), run:
        fail()
    [event] = [row for row in read_log(run.folder.events) if row["kind"] == "checkpoint_failed"]
    assert (event["role"], event["cause"]) == ("writer-0", "cannot write")
