"""A node goes away, and the others have no room for what was on it. Roles are stubs; Ray and its nodes are real."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from tests.system.commands import rows_of, start

pytestmark = pytest.mark.timeout(300)


def test_a_run_ends_that_has_no_room_any_more(tmp_path: Path) -> None:
    # A role that Ray would start again, and ranks that the run would.
    keys = ("generator", "policy.learner")
    commands = [start((str(tmp_path / key), key), tmp_path / key / "output", "tests.system.lost_node") for key in keys]
    for command, key in zip(commands, keys, strict=True):
        command.wait(240)
        assert command.process.returncode == 1, command.stderr
        said = r"cluster on \?: no room within [12]\d s \(cluster\.placement_timeout_s\)\. Asked for generator: 1 x "
        assert re.search(said, command.stderr), command.stderr
        events = rows_of(tmp_path / key / "runs" / "tiny-ppo" / "events.jsonl")
        [failed] = [event for event in events if event["kind"] == "run_failed"]
        waited = datetime.fromisoformat(failed["time"]).timestamp() - (tmp_path / key / "lost").stat().st_mtime
        # The deadline, and a few looks of who watches.
        assert 5 < waited < 40
        assert command.left_running() == []
