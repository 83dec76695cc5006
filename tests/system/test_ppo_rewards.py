"""Several sources of rewards in one run: a model, and two functions of which one fails on some samples.

Newer weights reach responses that are under way, and the distance from the reference ends the run early.
"""

import json
from pathlib import Path

import pytest

from tests.system.commands import PPO, Command, rows_of, run

pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 400.0
FUNCTIONS = "tests.unit.reward_functions"
SOURCES = (
    "reward=[{name: helpful, model: '${paths.data}/tiny/reward_model', max_length: 128}, "
    f"{{function: '{FUNCTIONS}:brief', weight: 2.0, batch_size: 4}}, "
    f"{{function: '{FUNCTIONS}:picky', weight: 0.1, timeout_s: 60, max_failed_fraction: 1}}]"
)
STEPS, SAMPLES, KL_LIMIT = 6, 16, 1e-5


def labelled(source: Path, target: Path) -> str:
    rows = [{**json.loads(line), "label": {"row": 7}} for line in source.read_text().splitlines()]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(target)


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, Path]:
    runs = tmp_path_factory.mktemp("rewards")
    command = run(
        (
            *PPO,
            f"paths.data={data_root}",
            f"paths.runs={runs}",
            f"steps={STEPS}",
            "algorithm.max_staleness=1",
            "algorithm.in_flight_updates=true",
            f"algorithm.kl.stop_above={KL_LIMIT}",
            SOURCES,
            f"prompts.path={labelled(data_root / 'tiny' / 'prompts.jsonl', runs / 'prompts.jsonl')}",
            f"evaluation.prompts.path={labelled(data_root / 'tiny' / 'prompts_test.jsonl', runs / 'test.jsonl')}",
        ),
        runs / "output",
        DEADLINE_S,
    )
    assert command.process.returncode == 0, command.stderr
    return command, runs / "tiny-ppo"


def test_each_source_is_told_by_its_name(finished: tuple[Command, Path]) -> None:
    rows = rows_of(finished[1] / "metrics.jsonl")
    for row in rows:
        for name in ("helpful", "brief", "picky"):
            for metric in ("mean", "std", "time_s"):
                assert isinstance(row[f"reward/{name}/{metric}"], float)
        assert [row[f"reward/{name}/failed_fraction"] for name in ("helpful", "brief")] == [0, 0]
        assert 0 < row["reward/picky/failed_fraction"] < 1
        assert row["reward/failures"] == SAMPLES * row["reward/picky/failed_fraction"]
        assert 0 < row["reward/brief/mean"] <= 1
        assert row["reward/picky/mean"] >= 0


def test_every_failure_has_its_cause_with_the_source_and_the_function(finished: tuple[Command, Path]) -> None:
    rows, events = (rows_of(finished[1] / name) for name in ("metrics.jsonl", "events.jsonl"))
    failed = [event for event in events if event["kind"] == "scores_failed"]
    cause = "picky: picky raised ValueError: cannot judge an answer to {'row': 7}"
    assert [event["causes"] for event in failed] == [{cause: row["reward/failures"]} for row in rows]
    started = {event["role"] for event in events if event["kind"] == "role_started"}
    assert {"reward-helpful-0", "reward-brief-0", "reward-picky-0"} <= started
    log = (finished[1] / "logs" / "reward-picky-0.log").read_text()
    assert "ValueError: cannot judge an answer to {'row': 7}" in log


def test_held_out_samples_have_the_weighted_sum_or_the_cause(finished: tuple[Command, Path]) -> None:
    samples = rows_of(finished[1] / "held_out_after.jsonl")
    failures = [sample["failure"] for sample in samples if sample["reward"] is None]
    assert 0 < len(failures) < len(samples)
    assert all(failure.startswith("picky: picky raised ValueError") for failure in failures)
    assert all(len(sample["response"]) % 2 == 0 for sample in samples if sample["reward"] is not None)
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert summary["held_out"]["failures_after"] == len(failures)


def test_a_policy_too_far_from_the_reference_ends_the_run_and_is_kept(finished: tuple[Command, Path]) -> None:
    command, folder = finished
    rows, events = (rows_of(folder / name) for name in ("metrics.jsonl", "events.jsonl"))
    assert 1 < len(rows) < STEPS
    assert [row["kl/reference"] > KL_LIMIT for row in rows] == [False] * (len(rows) - 1) + [True]
    [ended] = [event for event in events if event["kind"] == "run_ended_early"]
    assert (ended["step"], ended["guard"]) == (len(rows), "kl")
    assert f"above algorithm.kl.stop_above {KL_LIMIT:g}" in command.stdout
    assert json.loads((folder / "summary.json").read_text())["steps"] == len(rows)
    assert (folder / "policy" / "model.safetensors").is_file()


def test_updates_in_flight_keep_the_bound_and_every_sync_is_proven(finished: tuple[Command, Path]) -> None:
    rows = rows_of(finished[1] / "metrics.jsonl")
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= 1 for row in rows)
    assert all(row["sync/max_abs_dlogp"] <= 1e-4 for row in rows)


def test_no_function_outlives_the_run(finished: tuple[Command, Path]) -> None:
    assert finished[0].left_running() == []


def test_a_function_that_is_not_there_is_bad_input_before_anything_starts(data_root: Path, tmp_path: Path) -> None:
    wrong = f"reward=[{{function: '{FUNCTIONS}:brief'}}, {{function: '{FUNCTIONS}:breif'}}]"
    command = run((*PPO, f"paths.data={data_root}", f"paths.runs={tmp_path}", wrong), tmp_path / "output", 120)
    assert command.process.returncode == 2
    assert command.stderr.splitlines() == [
        f"bad input: reward.1.function: {FUNCTIONS}:breif: '{FUNCTIONS}' has no function 'breif'; "
        "the name of a function of that module"
    ]
    assert not (tmp_path / "tiny-ppo").exists()
