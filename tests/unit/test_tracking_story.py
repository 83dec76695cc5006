"""The story of a run, told from files as runs write them."""

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.failures import BadInput
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.story import read_story
from rlhf_ray.tracking.story_page import duration, report_run

START = datetime(2026, 11, 26, 22, 4, 11, tzinfo=UTC)
STEPS, SAMPLES = 10, 8


class Written:
    """A run's folder, written event by event."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path)
        self.folder.config_yaml.write_text("sampling: {prompts_per_step: 4, samples_per_prompt: 2}\n")
        self.event(0, "run_started", name="x", kind_of_run="ppo")

    def event(self, at_s: float, kind: str, **details: Any) -> None:
        time = (START + timedelta(seconds=at_s)).isoformat(timespec="milliseconds")
        self._append(
            self.folder.events, {"role": None, "node": None, "cause": None, **details, "time": time, "kind": kind}
        )

    def steps(self, first: int = 1, last: int = STEPS) -> None:
        for step in range(first, last + 1):
            self._append(self.folder.metrics, {"step": step, "reward/mean": (step - 7) ** 2, "kl/reference": None})
            use = {"trained": [[step * SAMPLES - SAMPLES, step * SAMPLES - 2]], "failed": [[step * SAMPLES - 1] * 2]}
            self._append(self.folder.ledger, {"step": step, **use})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def told(written: Written) -> list[tuple[str, str, str, float | None, str]]:
    story = read_story(written.folder)
    return [(each.what, each.who, each.why, each.took_s, each.outcome) for each in story.happenings[1:]]


def test_an_undisturbed_run(written: Written):
    written.steps()
    written.event(90, "checkpoint_saved", step=5)
    written.event(100, "run_finished")
    story = read_story(written.folder)
    assert (story.name, story.command, story.starts, story.steps, story.elapsed_s) == ("x", "ppo", 1, STEPS, 100)
    assert (story.verdict, story.tone) == ("finished after 10 steps, every sample used exactly once", "good")
    [reward] = story.figures
    assert (reward.name, reward.first, reward.last, reward.best) == ("reward/mean", 36, 9, (36, 1))
    assert story.counts == {"checkpoint_saved": 1}
    assert story.ledger is not None
    assert (story.ledger.trained, story.ledger.set_aside) == (70, 10)


def test_a_recovery_stands_with_the_loss_that_it_mends(written: Written):
    written.event(10, "role_lost", role="generator-1", node="a", cause="killed by signal 9")
    written.event(11, "role_lost", role="reward-helpful-0", node="b", cause="out of memory")
    written.event(13, "role_restarted", role="generator-1", node="a", attempt=1, seconds=3.0)
    written.event(20, "role_restarted", role="reward-helpful-0", node="c", attempt=2, seconds=9.0)
    written.event(30, "role_silent", role="generator-1", node="a", seconds=45.0, doing="generate")
    written.event(33, "role_lost", role="policy-1", node="a", cause="NCCL. And a paragraph of what that may mean.")
    written.event(40, "group_rebuilt", role="policy", cause="policy-1 was lost", seconds=7.0)
    written.event(41, "rolled_back", from_step=8, to_step=5, cause="policy-1 was lost")
    assert told(written) == [
        ("lost", "generator-1 on a", "killed by signal 9", 3.0, "back"),
        ("lost", "reward-helpful-0 on b", "out of memory", 9.0, "back at attempt 2"),
        ("silent during 'generate'", "generator-1 on a", "", 45.0, ""),
        ("lost", "policy-1 on a", "NCCL", 7.0, "group rebuilt"),
        ("back from step 8 to step 5", "", "policy-1 was lost", None, ""),
    ]
    story = read_story(written.folder)
    assert len(story.lost_roles) == 4
    assert story.recovering_s == 19.0
    assert [each.tone for each in story.lost_roles] == ["warn", "warn", "bad", "warn"]


def test_a_loss_that_is_said_twice_is_one_and_a_group_is_mended_with_all_its_ranks(written: Written):
    written.event(10, "role_silent", role="policy-1", node="a", cause="train: no processor time used", seconds=30.0)
    written.event(11, "role_lost", role="policy-1", node="a", cause="killed by signal 9")
    written.event(12, "role_lost", role="policy-0", node="a", cause="gloo: connection closed")
    written.event(12, "role_lost", role="policy-0", node="a", cause="gloo: connection closed")
    written.event(13, "role_lost", role="policy-helper-0", node="a", cause="another role")
    written.event(20, "group_rebuilt", role="policy", cause="gloo: connection closed", seconds=8.0)
    assert told(written) == [
        ("silent", "policy-1 on a", "train: no processor time used; killed by signal 9", None, "group rebuilt"),
        ("lost", "policy-0 on a", "gloo: connection closed", 8.0, "group rebuilt"),
        ("lost", "policy-helper-0 on a", "another role", None, ""),
    ]
    assert read_story(written.folder).recovering_s == 8.0


def test_a_recovery_without_a_loss_is_told_all_the_same(written: Written):
    written.event(40, "group_rebuilt", role="policy", cause="a rank was lost", seconds=7.0)
    assert told(written) == [("group rebuilt", "policy", "a rank was lost", 7.0, "")]


@pytest.mark.parametrize(
    ("kind", "details", "verdict", "tone"),
    [
        (
            "run_failed",
            {"role": "policy-0", "node": "a", "cause": "no room", "guard": "disk", "failure": "fatal"},
            "failed, stopped by the guard 'disk' after step 10: policy-0 on a: no room",
            "bad",
        ),
        ("run_failed", {"cause": "KeyError: 'x'"}, "failed after step 10: KeyError: 'x'", "bad"),
        (
            "run_stopped",
            {"cause": "signal 15", "step": 10},
            "stopped after step 10 by signal 15; continue with",
            "warn",
        ),
        ("role_lost", {"role": "policy-0"}, "no end was written: under way, or killed after step 10", "warn"),
    ],
)
def test_the_verdict_says_how_it_ended(written: Written, kind: str, details: dict[str, Any], verdict: str, tone: str):
    written.steps()
    written.event(50, kind, **details)
    story = read_story(written.folder)
    assert story.verdict.startswith(verdict)
    assert story.tone == tone


def test_the_verdict_is_of_the_last_start(written: Written):
    written.steps()
    written.event(50, "run_failed", cause="out of memory")
    written.event(60, "run_started", name="x", kind_of_run="ppo")
    assert read_story(written.folder).verdict.startswith("no end was written")
    written.event(90, "run_finished")
    story = read_story(written.folder)
    assert (story.tone, story.starts) == ("good", 2)
    assert [each.what for each in story.happenings] == ["started", "failed", "started again", "finished"]


def test_a_run_that_ended_early_says_why(written: Written):
    written.steps()
    written.event(50, "run_ended_early", step=10, cause="kl/reference is 9 nats", guard="kl")
    written.event(60, "run_finished")
    story = read_story(written.folder)
    assert story.verdict == "ended early after step 10, stopped by the guard 'kl': kl/reference is 9 nats"
    assert story.tone == "warn"


def test_a_sample_that_is_not_used_exactly_once_spoils_the_verdict(written: Written):
    written.steps(1, 4)
    written.steps(4, 5)
    written.steps(7, STEPS)
    written.event(60, "run_finished")
    story = read_story(written.folder)
    assert story.verdict == "finished after 10 steps, but not every sample was used exactly once"
    assert story.tone == "bad"
    assert story.ledger is not None
    assert (story.ledger.missing, story.ledger.repeated) == (SAMPLES, SAMPLES)


def test_a_clock_that_was_set_back_does_not_shorten_the_story(written: Written):
    written.event(100, "role_lost", role="generator-0")
    written.event(200 - 3600, "clock_jumped", cause="the clock was set by -3600 s", jump_s=-3600.0)
    written.event(300 - 3600, "run_finished")
    story = read_story(written.folder)
    assert story.elapsed_s == 300
    assert [each.at_s for each in story.happenings] == [0, 100, 200, 300]


def test_a_run_that_was_killed_in_the_middle_of_a_line_can_be_told(written: Written):
    written.steps(1, 3)
    with written.folder.events.open("a") as file:
        file.write('{"time": "20')
    assert read_story(written.folder).steps == 3


def test_a_run_of_another_command_has_no_ledger(tmp_path: Path):
    written = Written(tmp_path)
    written.folder.events.unlink()
    written.event(0, "run_started", name="rm", kind_of_run="reward_model")
    written.event(1, "run_finished")
    written.folder.metrics.write_text(
        '{"step": 1, "loss": 0.5, "accuracy": 0.75}\n{"step": 2, "loss": 0.4, "accuracy": 0.5}\n'
    )
    story = read_story(written.folder)
    assert (story.command, story.ledger, story.verdict) == ("train-rm", None, "finished after 2 steps")
    assert [(each.name, each.best) for each in story.figures] == [("loss", (0.4, 2)), ("accuracy", (0.75, 1))]


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path):
    with pytest.raises(BadInput, match=r"has no events\.jsonl"):
        read_story(RunFolder(tmp_path / "nothing"))


def test_terminal_and_page_tell_the_same(written: Written):
    written.steps()
    written.event(10, "role_lost", role="generator-1", node="a", cause="killed by <signal> 9")
    written.event(13, "role_restarted", role="generator-1", node="a", attempt=1, seconds=3.0)
    written.event(20, "checkpoint_broken", step=5, cause="weights.pt is missing [bold]")
    written.event(100, "run_finished")
    printed = io.StringIO()
    page = report_run(written.path, Console(file=printed, width=160))
    text, html = printed.getvalue(), page.read_text()
    assert page == written.path / "report.html"
    for said in (
        "Finished after 10 steps, 1 lost role recovered, every sample used exactly once",
        "generator-1 on a",
        "3.0 s",
        "the checkpoint of step 5 cannot be used",
        "weights.pt is missing [bold]",
        "reward/mean",
        "36 at step 1",
        "70 samples trained and 10 set aside in 10 steps; none missing, none used twice",
    ):
        assert said in text, said
        assert said in html, said
    assert "killed by <signal> 9" in text
    assert "killed by &lt;signal&gt; 9" in html
    assert not re.search(r"(src|href)=|@import|url\(", html), "the page is one file"


def test_the_command_reads_a_folder_and_writes_the_page(written: Written):
    written.steps()
    result = CliRunner().invoke(app, ["report", str(written.path)])
    assert result.exit_code == 0
    assert "No end was written" in result.stdout
    assert (written.path / "report.html").exists()


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (4.21, 59.9, 187, 3723)] == ["4.2 s", "59.9 s", "3:07 min", "1:02:03 h"]
