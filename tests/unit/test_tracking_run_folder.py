import os

import pytest

from rlhf_ray.failures import BadInput, Finished
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "runs" / "x", "a: 1\n", resume=False)


def checkpoint(folder, step, complete=True):
    path = folder.checkpoint_path(step)
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"w")
    if complete:
        (path / "manifest.json").write_text("{}")
    return path


def test_a_new_folder_holds_the_configuration(folder):
    assert folder.config_yaml.read_text() == "a: 1\n"
    assert folder.logs.is_dir()
    assert folder.checkpoint_path(10) == folder.path / "checkpoints" / "step-000010"


def test_a_start_that_failed_before_its_first_step_may_be_repeated(folder):
    folder.events.write_text("{}\n")
    folder.metrics.touch()
    RunFolder.create(folder.path, "a: 2\n", resume=False)
    assert folder.config_yaml.read_text() == "a: 2\n"


def test_a_finished_run_is_not_touched(folder):
    folder.summary.write_text("{}")
    checkpoint(folder, 10)
    with pytest.raises(BadInput) as caught:
        RunFolder.create(folder.path, "a: 2\n", resume=False)
    assert (caught.value.where, caught.value.found) == (str(folder.path), "holds a finished run")
    assert "another run.name, or delete" in caught.value.allowed
    with pytest.raises(Finished, match=f"{folder.path} holds a finished run"):
        RunFolder.create(folder.path, "a: 2\n", resume=True)
    assert folder.config_yaml.read_text() == "a: 1\n"


def test_an_unfinished_run_needs_resume_or_another_name(folder):
    folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(BadInput, match="holds an unfinished run; add --resume, or choose another"):
        RunFolder.create(folder.path, "a: 2\n", resume=False)
    checkpoint(folder, 1)
    RunFolder.create(folder.path, "a: 2\n", resume=True)


def test_a_run_that_is_not_there_yet_or_has_no_complete_checkpoint_is_begun_by_resume(folder, tmp_path):
    checkpoint(folder, 10, complete=False)
    folder.metrics.write_text('{"step": 1}\n')
    for path in (folder.path, tmp_path / "nothing"):
        assert RunFolder.create(path, "a: 2\n", resume=True).config_yaml.read_text() == "a: 2\n"


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "x", "", resume=False)


def test_the_latest_checkpoint_is_the_newest_complete_one_by_number(folder):
    assert folder.latest_checkpoint() is None
    for step in (9, 999999, 1000000):
        checkpoint(folder, step)
    checkpoint(folder, 1000001, complete=False)
    (folder.checkpoints / "step-old").mkdir()
    assert folder.latest_checkpoint() == (1000000, folder.checkpoints / "step-1000000")


def test_prune_keeps_the_newest_complete_ones_and_one_on_its_way(folder):
    for step in (10, 20, 30):
        checkpoint(folder, step)
    checkpoint(folder, 15, complete=False)
    checkpoint(folder, 40, complete=False)
    folder.prune(keep=2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000020", "step-000030", "step-000040"]


def test_an_interrupted_prune_leaves_nothing_that_looks_complete(folder, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    checkpoint(folder, 10)
    checkpoint(folder, 20)
    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.prune(keep=1)
    assert not (folder.checkpoint_path(10) / "manifest.json").exists()
    assert folder.latest_checkpoint() == (20, folder.checkpoint_path(20))


def test_an_atomic_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_is_readable_like_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "atomic", b"\x00\xff")
    assert (tmp_path / "atomic").read_bytes() == b"\x00\xff"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
