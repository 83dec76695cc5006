"""A checkpoint is whole, or what is wrong with it is named and the one before it is taken."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_ray.failures import BadInput, FailureKind, RoleFailure
from rlhf_ray.runtime.answers import Answer
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.logs import Row, read_log
from rlhf_ray.tracking.manifest import begin, checkpoint_bytes, find_fault, read_manifest, write_manifest
from tests.making import unread_config

WEIGHTS = "policy/state/weights.pt"
WEIGHT_BYTES = 3 << 20  # more than one chunk


@dataclass
class State:
    step: int = 0


def save(folder: str) -> list[Answer[None]]:
    """What learners leave in a checkpoint."""
    path = Path(folder) / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(WEIGHT_BYTES))
    return []


def run_of(runs: Path, resume: bool = False) -> Run:
    config = unread_config(runs, every_steps=10)
    return Run(config, "sft", "x", 100, (), config.checkpoint, resume)


def go_on(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.tracker.metrics.write({"step": step})
        run.keep(step, State(step), save)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Holds a run that ended at step 23, with checkpoints of the steps 10 and 20."""
    with run_of(tmp_path) as run:
        go_on(run, 1, 23)
    return tmp_path


def events_of(runs: Path, kind: str) -> list[Row]:
    return [event for event in read_log(runs / "x" / "events.jsonl") if event["kind"] == kind]


def newest(runs: Path) -> Path:
    return runs / "x" / "checkpoints" / "step-000020"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: os.truncate(path / WEIGHTS, 1000), f"{WEIGHTS} has 1,000 bytes, 3,145,728 were written"),
    "flipped": (lambda path: flip(path / WEIGHTS, WEIGHT_BYTES - 1), f"{WEIGHTS} is not what was written"),
    "gone": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "state": (lambda path: flip(path / "state.json", 3), "state.json is not what was written"),
    "half": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing: the checkpoint was never"),
    "unreadable": (lambda path: flip(path / "manifest.json", 0), "manifest.json cannot be read"),
}


def test_a_manifest_lists_every_file_and_is_written_last(runs: Path):
    listed = {each.name: each.size for each in read_manifest(newest(runs))}
    assert listed == {WEIGHTS: WEIGHT_BYTES, "state.json": (newest(runs) / "state.json").stat().st_size}
    assert checkpoint_bytes(newest(runs)) == sum(listed.values()) + (newest(runs) / "manifest.json").stat().st_size
    assert find_fault(newest(runs)) is None
    written = [(newest(runs) / name).stat().st_mtime_ns for name in (*listed, "manifest.json")]
    assert written == sorted(written)


def test_a_whole_checkpoint_is_resumed_from(runs: Path):
    with run_of(runs, resume=True) as run:
        restored = run.restore(State)
    assert restored == (State(20), newest(runs).absolute())
    assert events_of(runs, "checkpoint_broken") == []
    assert [row["step"] for row in read_log(runs / "x" / "metrics.jsonl")] == list(range(1, 21))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(runs: Path, damage: str):
    harm, cause = DAMAGES[damage]
    harm(newest(runs))
    with run_of(runs, resume=True) as run:
        restored = run.restore(State)
        assert restored is not None
        assert restored[0] == State(10)
        [event] = events_of(runs, "checkpoint_broken")
        assert (event["step"], event["path"]) == (20, str(newest(runs)))
        assert str(event["cause"]).startswith(cause)
        assert [row["step"] for row in run.tracker.metrics.read()] == list(range(1, 11))
        # Its step comes again, and the damaged one is written anew.
        go_on(run, 11, 20)
    assert find_fault(newest(runs)) is None
    assert run.folder.latest_checkpoint() == (20, newest(runs))


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_whole_one(runs: Path):
    flip(newest(runs) / WEIGHTS, 0)
    with run_of(runs, resume=True) as run:
        run.restore(State)
        run.folder.prune(keep=1)
        assert run.folder.latest_checkpoint() == (10, run.folder.checkpoint_path(10))


def test_the_display_names_the_damaged_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch):
    flip(newest(runs) / WEIGHTS, 0)
    run, shown = run_of(runs, resume=True), []
    monkeypatch.setattr(run.tracker.display, "message", shown.append)
    with run:
        pass
    assert shown == [f"the checkpoint of step 20 cannot be used: {WEIGHTS} is not what was written (its hash differs)"]


def test_when_none_is_whole_the_run_does_not_start_and_nothing_is_changed(runs: Path):
    older = newest(runs).with_name("step-000010")
    flip(newest(runs) / WEIGHTS, 0)
    shutil.rmtree(older / "policy")
    with pytest.raises(BadInput, match="not one checkpoint is whole") as caught, run_of(runs, resume=True):
        pass
    assert f"step-000020: {WEIGHTS} is not what was written" in caught.value.found
    assert f"step-000010: {WEIGHTS} is missing" in caught.value.found
    assert len(events_of(runs, "checkpoint_broken")) == 2
    assert (newest(runs) / "manifest.json").exists()
    assert (older / "manifest.json").exists()


def test_a_disk_without_room_stops_the_run_before_anything_is_written(runs: Path, monkeypatch: pytest.MonkeyPatch):
    needed = checkpoint_bytes(newest(runs))
    usage = shutil.disk_usage(runs)
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with run_of(runs, resume=True) as run:
            run.restore(State)
            if fits:
                go_on(run, 21, 30)
                continue
            with pytest.raises(
                RoleFailure, match=rf"has {free:,} bytes left, and a checkpoint takes {needed:,}"
            ) as end:
                go_on(run, 31, 40)
            assert (end.value.kind, end.value.role, end.value.guard) == (FailureKind.FATAL, "driver", "disk")
            assert not run.folder.checkpoint_path(40).exists()
            assert find_fault(run.folder.checkpoint_path(30)) is None


def test_a_write_that_fails_names_the_step_and_leaves_the_checkpoint_before_it(runs: Path):
    def full(folder: str) -> list[Answer[None]]:
        (Path(folder) / "weights.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = run_of(runs, resume=True)
    with pytest.raises(RoleFailure, match=r"checkpoint of step 30 could not be written: .*No space left"), run:
        run.keep(30, State(30), full)
    [event] = events_of(runs, "run_failed")
    assert (event["role"], event["guard"]) == ("driver", "disk")
    with run_of(runs, resume=True) as run:
        restored = run.restore(State)
    assert restored is not None
    assert restored[0] == State(20)


def test_a_disk_that_cannot_take_the_event_either_does_not_hide_the_cause(runs: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(runs, resume=True)

    def fail() -> None:
        with run:
            monkeypatch.setattr(run.tracker.events, "path", Path("/dev/full"))
            raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        fail()


def test_what_a_manifest_does_not_list_does_no_harm(tmp_path: Path):
    save(str(tmp_path))
    write_manifest(tmp_path)
    (tmp_path / ".nfs0001").write_bytes(b"")
    assert find_fault(tmp_path) is None


def test_a_run_that_ended_while_it_wrote_its_first_checkpoint_begins_again(runs: Path, tmp_path: Path):
    folder = tmp_path / "another"
    run = run_of(folder)
    with run:
        begin(run.folder.checkpoint_path(10))
    with run_of(folder, resume=True) as again:
        assert again.restore(State) is None
    assert len(events_of(folder, "checkpoint_broken")) == 1
