"""Runs that a guard stops: non-zero, with the role, the cause and what to do, and with nothing poisoned kept."""

from pathlib import Path
from typing import Any

import pytest

from tests.system.commands import PPO, Command, rows_of, run

pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 400.0


def refused(data: Path, runs: Path, *settings: str) -> tuple[Command, dict[str, Any]]:
    """A run that ends by itself, and the event that says why."""
    small = (f"paths.data={data}", f"paths.runs={runs}", "steps=2", "checkpoint.every_steps=1")
    command = run((*PPO, *small, *settings), runs / "output", DEADLINE_S)
    assert command.process.returncode == 1
    assert command.left_running() == []
    folder = runs / "tiny-ppo"
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "summary.json").exists()
    [event] = [event for event in rows_of(folder / "events.jsonl") if event["kind"] == "run_failed"]
    assert command.stderr.startswith(f"failed: {event['role']} on {event['node']}: {event['cause']}")
    return command, event


def test_a_gradient_that_is_not_finite_ends_the_run(data_root: Path, tmp_path: Path) -> None:
    """The entropy bonus overflows float32, and so does the loss."""
    _, event = refused(data_root, tmp_path, "algorithm.entropy_coefficient=1e39")
    assert (event["role"], event["guard"], event["failure"]) == ("policy-0", "gradient", "fatal")
    assert event["cause"].startswith("the gradient of update 1 is not finite")


def test_a_source_that_fails_too_often_ends_the_run_before_it_is_trained_on(data_root: Path, tmp_path: Path) -> None:
    source = "reward=[{function: 'tests.unit.reward_functions:picky', timeout_s: 60, max_failed_fraction: 0}]"
    _, event = refused(data_root, tmp_path, source, "evaluation.prompts=null")
    assert (event["role"], event["guard"]) == ("reward 'picky'", "scores")
    assert "above max_failed_fraction 0: {'picky raised ValueError" in event["cause"]
    assert not (tmp_path / "tiny-ppo" / "ledger.jsonl").exists()
