"""A run whose machine is gone goes on from its copy."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlhf_ray.config.settings import SFTConfig
from rlhf_ray.failures import BadInput, Finished
from rlhf_ray.runtime.answers import Answer
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.logs import read_log
from rlhf_ray.tracking.run_copy import RunCopy
from rlhf_ray.tracking.run_folder import MANIFEST
from rlhf_ray.tracking.tracker import take_up_copy
from tests.making import unread_config
from tests.unit.test_run import State


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/far/away" if request.param == "file" else f"memory://{tmp_path.name}/far"
    fsspec.filesystem("memory").store.clear()


def config_of(runs: Path, url: str | None) -> SFTConfig:
    return unread_config(runs, every_steps=2, copy_to=url)


def save(folder: str) -> list[Answer[None]]:
    (Path(folder) / "policy").mkdir()
    (Path(folder) / "policy" / "weights").write_bytes(Path(folder).name.encode() * 1000)
    return []


def go_on(config: SFTConfig, last: int, resume: bool = False) -> int:
    """To a step; gives the one that it began after."""
    take_up_copy(config, resume)
    with Run(config, "sft", "x", 100, (), config.checkpoint, resume) as run:
        restored = run.restore(State)
        first = restored[0].step if restored else 0
        for step in range(first + 1, last + 1):
            run.tracker.metrics.write({"step": step})
            (run.folder.path / "best").mkdir(exist_ok=True)
            (run.folder.path / "best" / "model").write_text(str(step))
            (run.folder.logs / "policy-0.log").write_text("printed")
            run.keep(step, State(step), save)
    return first


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("events.jsonl", ".lock")
    }


def test_a_run_whose_disk_is_gone_goes_on_from_its_copy(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    go_on(config, 9)
    copy = RunCopy(config.checkpoint, "x")
    assert copy.steps() == [6, 8]
    shutil.rmtree(tmp_path / "runs")
    assert go_on(config, 12, resume=True) == 8
    go_on(config_of(tmp_path / "alone", None), 12)
    gone_on, alone = files_of(tmp_path / "runs" / "x"), files_of(tmp_path / "alone" / "x")
    assert gone_on.pop("config.yaml") != alone.pop("config.yaml")
    assert gone_on == alone
    assert copy.steps() == [10, 12]
    kinds = [row["kind"] for row in read_log(tmp_path / "runs" / "x" / "events.jsonl")]
    # Of the first process as well.
    assert kinds.count("checkpoint_saved") >= 5
    assert "copy_fetched" in kinds


def test_what_is_here_and_newer_stays(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    go_on(config, 4)
    local = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"copy_to": None})})
    assert go_on(local, 6, resume=True) == 4
    assert go_on(config, 7, resume=True) == 6


def test_half_a_copy_is_none(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    go_on(config, 4)
    files, root = fsspec.url_to_fs(f"{url}/x")
    files.rm_file(f"{root}/checkpoints/step-000004/{MANIFEST}")
    shutil.rmtree(tmp_path / "runs")
    assert go_on(config, 4, resume=True) == 2


def test_a_damaged_copy_is_named_and_not_gone_on_from(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    go_on(config, 2)
    files, root = fsspec.url_to_fs(f"{url}/x")
    files.pipe_file(f"{root}/checkpoints/step-000002/policy/weights", b"other words")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(BadInput, match=r"not one checkpoint is whole .*policy/weights has 11 bytes"):
        go_on(config, 3, resume=True)


def test_the_copy_of_another_run_is_not_written_over(tmp_path: Path, url: str):
    go_on(config_of(tmp_path / "runs", url), 4)
    with pytest.raises(BadInput, match=r"checkpoint\.copy_to: .*holds a run, up to step 4; --resume, or another"):
        go_on(config_of(tmp_path / "others", url), 4)


def test_a_place_that_is_not_there_is_named_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    for where, found in {
        "nowhere://bucket": r"Protocol not known: nowhere",
        f"file://{tmp_path}/file": r"cannot be written \(.*Error",
    }.items():
        with pytest.raises(BadInput, match=rf"checkpoint\.copy_to: .*{found}"):
            take_up_copy(config_of(tmp_path / "runs", where), False)


def failed_copies(runs: Path) -> list[tuple[str, str]]:
    rows = read_log(runs / "x" / "events.jsonl")
    return [(row["what"], row["cause"]) for row in rows if row["kind"] == "copy_failed"]


def test_a_copy_that_fails_is_told_and_the_next_one_sends_all_that_is_missing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(tmp_path / "runs", url)
    send, sent = RunCopy._send, []

    def fail_once(self: RunCopy, *args: Any) -> None:
        sent.append(args)
        if len(sent) == 2:  # the checkpoint's own files went first
            raise ConnectionResetError("gone for a moment")
        send(self, *args)

    monkeypatch.setattr(RunCopy, "_send", fail_once)
    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        (run.folder.path / "best").write_text("written once")
        for step in (2, 4):
            run.tracker.metrics.write({"step": step})
            run.keep(step, State(step), save)
            run._writer.settle()
            assert run._copying is not None
            run._copying.settle(60)
    told = ("the checkpoint of step 2", "ConnectionResetError: gone for a moment")
    assert failed_copies(tmp_path / "runs") == [told]
    assert RunCopy(config.checkpoint, "x").steps() == [4]
    shutil.rmtree(tmp_path / "runs")
    take_up_copy(config, True)
    assert (tmp_path / "runs" / "x" / "best").read_text() == "written once"


def test_a_slow_place_holds_up_no_step_and_has_the_newest_in_the_end(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(tmp_path / "runs", url)
    answers, send = threading.Event(), RunCopy.send

    def late(self: RunCopy, *args: Any) -> None:
        assert answers.wait(60)
        send(self, *args)

    monkeypatch.setattr(RunCopy, "send", late)
    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        for step in (2, 4, 6, 8):
            run.tracker.metrics.write({"step": step})
            run.keep(step, State(step), save)
        run._writer.settle()
        # The one that is on its way stays, and no more than are kept beside it.
        assert [step for step, _ in run.folder.complete_checkpoints()] == [2, 6, 8]
        answers.set()
    assert RunCopy(config.checkpoint, "x").steps() == [2, 8]
    told = [
        (f"the checkpoint of step {step}", f"the checkpoint of step {step + 2} took its place before it could be sent")
        for step in (4, 6)
    ]
    assert failed_copies(tmp_path / "runs") == told


def test_what_is_not_there_in_time_is_told_and_waited_for_no_longer(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    answers = threading.Event()
    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        assert run._copying is not None
        run._copying._begin("the results", None, lambda: answers.wait(60))
        run._copying.settle(0.1)
        run._copying.settle(60)
        answers.set()
    assert failed_copies(tmp_path / "runs") == [("the results", "it was not there after 0 s")]


def test_the_best_policy_is_never_taken_for_another(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    """Weights that are half written when they are sent have no record beside them, here or there."""
    config = config_of(tmp_path / "runs", url)
    files, root = fsspec.url_to_fs(f"{url}/x")

    def there() -> list[str]:
        return sorted(name.removeprefix(f"{root}/policy_best/") for name in files.find(f"{root}/policy_best"))

    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        best = run.folder.policy_best
        best.mkdir()
        (best / "weights").write_text("first")
        (best / "best.json").write_text("{}")
        copy = RunCopy(config.checkpoint, "x")
        copy.send_results(run.folder)
        assert there() == ["best.json", "weights"]
        (best / "best.json").unlink()
        (best / "weights").write_text("half of the second")
        copy.send_results(run.folder)
        assert there() == ["weights"]
        (best / "weights").write_text("the second, whole")
        (best / "best.json").write_text('{"step": 2}')
        sent: list[list[str]] = []
        send = RunCopy._send

        def note(self: RunCopy, folder: Any, paths: Any) -> None:
            sent.append([path.name for path in paths])
            send(self, folder, paths)

        monkeypatch.setattr(RunCopy, "_send", note)
        copy.send_results(run.folder)
        assert there() == ["best.json", "weights"]
        assert [names for names in sent if "weights" in names or "best.json" in names] == [["weights"], ["best.json"]]


def test_what_a_finished_run_has_left_behind_is_copied(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        run.tracker.metrics.write({"step": 3})
        (run.folder.path / "policy").mkdir()
        (run.folder.path / "policy" / "weights").write_text("trained")
        run.tracker.finish({"name": "x"})
    files, root = fsspec.url_to_fs(f"{url}/x")
    assert files.cat_file(f"{root}/policy/weights") == b"trained"
    assert b'"name": "x"' in files.cat_file(f"{root}/summary.json")
    with pytest.raises(BadInput, match="holds a finished run"):
        take_up_copy(config_of(tmp_path / "others", url), False)
    # It never had a checkpoint, and is found all the same.
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(Finished):
        take_up_copy(config, True)
    assert (tmp_path / "runs" / "x" / "policy" / "weights").read_text() == "trained"


def test_a_finished_run_is_finished_wherever_it_is_taken_up(tmp_path: Path, url: str):
    config = config_of(tmp_path / "runs", url)
    with Run(config, "sft", "x", 100, (), config.checkpoint, False) as run:
        run.tracker.metrics.write({"step": 2})
        run.keep(2, State(2), save)
        run.tracker.finish({"name": "x"})
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(Finished):
        take_up_copy(config, True)
    assert (tmp_path / "runs" / "x" / "checkpoints" / "step-000002" / MANIFEST).exists()
