import json
import math
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from rlhf_ray.failures import BadInput, RoleFailure
from rlhf_ray.tracking.logs import EventLog, MetricsLog, append_row, read_log, truncate_after


@pytest.fixture
def events(tmp_path):
    return EventLog(tmp_path / "events.jsonl")


@pytest.fixture
def metrics(tmp_path, events):
    return MetricsLog(tmp_path / "metrics.jsonl", events)


def test_each_row_is_a_line_on_disk_at_once(metrics, tmp_path):
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step
        assert json.loads(lines[-1]) == {"step": step, "loss": 0.5}


def test_numbers_json_cannot_write_become_null_and_an_event(metrics, events, tmp_path):
    metrics.write({"step": 3, "loss": math.nan, "kl": -math.inf, "reward": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 3, "loss": None, "kl": None, "reward": 1.0}
    found = [
        (event["kind"], event["metric"], event["step"], event["cause"]) for event in read_log(tmp_path / "events.jsonl")
    ]
    assert found == [("metric_not_finite", "loss", 3, "loss is nan"), ("metric_not_finite", "kl", 3, "kl is -inf")]


def test_a_half_last_line_is_passed_over_by_readers_and_removed_by_writers(metrics, events, tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    MetricsLog(path, events).write({"step": 2})
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_first_line_leaves_an_empty_log(events, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    assert MetricsLog(path, events).read() == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("broken", ["{oops", "[1]", ""])
def test_a_broken_line_inside_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl:2: is not a JSON object"):
        read_log(path)


def test_a_resume_drops_the_rows_it_does_again(metrics):
    for step in range(1, 6):
        metrics.write({"step": step, "reward": "ä"})
    before = metrics.read()
    assert truncate_after(metrics._path, 3) == 2
    assert metrics.read() == before[:3]
    assert truncate_after(metrics._path, 3) == 0
    metrics.write({"step": 4})
    assert [row["step"] for row in metrics.read()] == [1, 2, 3, 4]


def test_a_full_disk_ends_the_run_and_is_named():
    with pytest.raises(RoleFailure, match=r"/dev/full cannot be written \(No space left on device\)") as failure:
        append_row(Path("/dev/full"), {"step": 1})
    assert (failure.value.role, failure.value.guard) == ("driver", "disk")


def test_truncating_a_log_that_is_not_there_drops_nothing(metrics):
    assert truncate_after(metrics._path, 3) == 0


def test_an_event_has_time_role_node_and_cause(events, tmp_path):
    events.write("actor_died", role="generator-1", node="10.0.0.2", cause="out of memory", restarts=2)
    events.write("run_started")
    died, started = read_log(tmp_path / "events.jsonl")
    assert datetime.fromisoformat(died.pop("time")).utcoffset() == timedelta(0)
    assert died == {
        "kind": "actor_died",
        "role": "generator-1",
        "node": "10.0.0.2",
        "cause": "out of memory",
        "restarts": 2,
    }
    assert started["role"] is None


def test_an_event_never_fails_for_what_it_tells(events, tmp_path):
    events.write("strange", error=ValueError("x"), value=math.inf, where=tmp_path, nested={"a": [math.nan]})
    (event,) = read_log(tmp_path / "events.jsonl")
    assert (event["error"], event["value"], event["where"], event["nested"]) == (
        "x",
        None,
        str(tmp_path),
        {"a": [None]},
    )
