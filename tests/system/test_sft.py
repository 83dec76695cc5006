"""`rlhf-ray sft` from the command line: stopped and resumed, it ends like a run that was left alone."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import yaml

from tests.system.commands import Command, rows_of, run, start, wait_until, without_times

pytestmark = pytest.mark.timeout(600)

STEPS = 40


def begin(data: Path, runs: Path, *more: str) -> Command:
    settings = {
        "run": {"name": "warm-up"},
        "text": {"path": str(data / "tiny" / "sft_train.jsonl"), "max_tokens": 256},
        "policy": {
            "model": str(data / "tiny" / "policy_tied"),
            "learner": {"dtype": "float32", "learning_rate": 1e-3, "warmup_steps": 4, "lr_schedule": "linear"},
        },
        "steps": STEPS,
        "batch_size": 8,
        "checkpoint": {"every_steps": 1000},
        "cluster": {"num_cpus": 1, "object_store_gib": 0.1},
        "paths": {"runs": str(runs)},
    }
    config = runs / "sft.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return start(("sft", str(config), *more), runs / "output")


def test_a_stopped_run_resumes_bit_for_bit(data_root: Path, tmp_path: Path) -> None:
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    for folder in (alone, stopped):
        folder.mkdir()
    commands = [begin(data_root, alone), begin(data_root, stopped, "--resume")]
    metrics = stopped / "warm-up" / "metrics.jsonl"
    wait_until(lambda: len(rows_of(metrics)) >= 2 or commands[1].process.poll() is not None, 300, "the second step")
    commands[1].process.send_signal(signal.SIGSTOP)  # or it would be at its end by the time that the second one looks
    second = run(("sft", str(stopped / "sft.yaml"), "--resume"), stopped / "second", 120)
    assert second.process.returncode == 2
    assert f"another process writes into it (process {commands[1].process.pid} on " in second.stderr
    commands[1].process.send_signal(signal.SIGTERM)
    commands[1].process.send_signal(signal.SIGCONT)
    assert commands[0].wait(300) == 0, commands[0].stderr
    assert commands[1].wait(60) == 1
    last = rows_of(metrics)[-1]["step"]
    assert 2 <= last < STEPS
    assert commands[1].stderr == f"stopped by signal 15 after step {last}; continue with --resume\n"

    resumed = begin(data_root, stopped, "--resume")
    assert resumed.wait(300) == 0, resumed.stderr
    whole, parts = (rows_of(folder / "warm-up" / "metrics.jsonl") for folder in (alone, stopped))
    assert [row["step"] for row in parts] == list(range(1, STEPS + 1))
    assert [without_times(row) for row in parts] == [without_times(row) for row in whole]
    assert whole[-1]["loss"] < whole[0]["loss"]
    weights = [folder / "warm-up" / "policy" / "model.safetensors" for folder in (alone, stopped)]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    assert json.loads((stopped / "warm-up" / "summary.json").read_text())["steps"] == STEPS
    assert resumed.left_running() == []
