"""A node goes away, and the others have no room for what was on it. Roles are stubs; Ray and its nodes are real."""

import time
from pathlib import Path

import pytest

from tests.system.commands import start

pytestmark = pytest.mark.timeout(300)


def test_a_run_ends_that_has_no_room_any_more(tmp_path: Path) -> None:
    # A role that Ray would start again, and ranks that the run would.
    keys = ("generator", "policy.learner")
    commands = [start((str(tmp_path / key), key), tmp_path / key / "output", "tests.system.lost_node") for key in keys]
    for command, key in zip(commands, keys, strict=True):
        command.wait(240)
        ended = time.time()
        assert command.process.returncode == 1, command.stderr
        assert "cluster on ?: no room within 1" in command.stderr
        assert "s (cluster.placement_timeout_s). Asked for generator: 1 x {'CPU': " in command.stderr
        # The deadline, two looks of who watches, and the end of everything else.
        assert ended - (tmp_path / key / "lost").stat().st_mtime < 40
        assert command.left_running() == []
