"""A run's folder has one writer, whose lock ends with it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import SFTConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.ppo.export import export_checkpoint
from rlhf_ray.tracking.run_lock import refuse_locked, run_lock
from rlhf_ray.tracking.tracker import check_folder, open_folder
from tests.conftest import REPOSITORY

_HOLD = """
import subprocess, sys
from pathlib import Path
from rlhf_ray.tracking.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
Holder = Callable[[Path], tuple[subprocess.Popen[str], int]]


@pytest.fixture
def hold() -> Iterator[Holder]:
    """Takes a lock in a process of its own, which has a child; gives the process, and the child's id."""
    processes: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(path: Path) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        children.append(int(process.stdout.readline()))
        return process, children[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    for child in children:
        os.kill(child, signal.SIGKILL)


def config(tmp_path: Path) -> SFTConfig:
    return load_config(
        SFTConfig, REPOSITORY / "configs" / "demo" / "sft.yaml", [f"paths.runs={tmp_path}", "run.name=x"]
    )


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path: Path, hold: Holder):
    settings, lock = config(tmp_path), tmp_path / "x" / ".lock"
    first, _ = hold(lock)
    told = rf"x: another process writes into it \(process {first.pid} on {socket.gethostname()}, since 20.*\+00:00\)"
    for resume in (False, True):
        with pytest.raises(BadInput, match=told):
            check_folder(settings, resume)
        with pytest.raises(BadInput, match=told), open_folder(settings, resume):
            pass
    assert not (tmp_path / "x" / "config.yaml").exists(), "nothing was written"


def test_a_killed_writer_leaves_no_lock_though_its_child_lives_on(tmp_path: Path, hold: Holder):
    settings = config(tmp_path)
    first, child = hold(tmp_path / "x" / ".lock")
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    os.kill(child, 0)
    check_folder(settings)
    with open_folder(settings) as folder:
        holder = json.loads(folder.lock.read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())


def test_the_lock_ends_with_its_block_and_looking_takes_none(tmp_path: Path):
    path = tmp_path / ".lock"
    refuse_locked(path)
    assert not path.exists()
    for _ in range(2):
        with run_lock(path), pytest.raises(BadInput, match="another process writes"):
            refuse_locked(path)
    refuse_locked(path)


def test_a_record_that_cannot_be_read_is_no_obstacle(tmp_path: Path):
    path = tmp_path / ".lock"
    with run_lock(path):
        path.write_text("{")
        with pytest.raises(BadInput, match="which one is not recorded"):
            refuse_locked(path)


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path):
    (tmp_path / "x").write_text("")
    with pytest.raises(BadInput, match="x: cannot be written"), open_folder(config(tmp_path)):
        pass
    with pytest.raises(BadInput, match="x: cannot be written"):
        check_folder(config(tmp_path))


def test_a_checkpoint_of_a_run_that_goes_on_is_not_exported(tmp_path: Path):
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": []}')
    tiny = (REPOSITORY / "configs" / "tiny" / "ppo.yaml").read_text()
    (tmp_path / "config.yaml").write_text(tiny)
    with run_lock(tmp_path / ".lock"), pytest.raises(BadInput, match="another process writes"):
        export_checkpoint(tmp_path, None, None)
