"""cluster/retry.sh: again until it succeeds, but not after a stop, nor after bad input."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

RETRY = str(REPOSITORY / "cluster" / "retry.sh")


def start(tmp_path: Path, attempts: str, script: str, delay: str = "0") -> subprocess.Popen[str]:
    """The command appends a line to `calls` each time it is run."""
    return subprocess.Popen(
        ["bash", RETRY, attempts, "bash", "-c", f"echo called >>calls; {script}"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "RETRY_DELAY_S": delay},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("script", "status", "calls"),
    [
        ("true", 0, 1),
        ("exit 1", 1, 4),
        ("exit 2", 2, 1),
        ("kill -KILL $$", 137, 4),
        ("(($(grep -c called calls) == 3))", 0, 3),
    ],
)
def test_it_tries_as_often_as_it_makes_sense(tmp_path: Path, script: str, status: int, calls: int):
    process = start(tmp_path, "4", script)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "calls").read_text().count("called") == calls
    assert said.count("ended with status") == calls - 1


def test_what_was_stopped_is_not_tried_again(tmp_path: Path):
    process = start(tmp_path, "4", "echo up; sleep 1; exit 1")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (1, "")
    assert (tmp_path / "calls").read_text() == "called\n", "the command had its time to end"


def test_a_stop_between_two_attempts_is_heard_within_a_second(tmp_path: Path):
    process = start(tmp_path, "4", "exit 3", delay="60")
    assert process.stderr is not None
    assert "again in 60 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=10) == 3


def test_it_says_how_it_is_used(tmp_path: Path):
    process = subprocess.run(["bash", RETRY, "3"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr[:6]) == (2, "usage:")
