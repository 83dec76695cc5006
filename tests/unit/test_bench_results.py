"""What `make bench-…` leaves behind."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from bench.results import Report, Result, publish


@pytest.mark.parametrize(
    ("value", "target", "holds"),
    [
        (1.5, ">= 1.5", True),
        (1.49, ">= 1.5", False),
        (600.0, "<= 600 s", True),
        (600.1, "<= 600 s", False),
        (0.0, "> 0", False),
        (-1.0, "< -0.5", True),
        (3.0, None, None),
    ],
)
def test_a_target_has_a_direction(value: float, target: str | None, holds: bool | None) -> None:
    assert Result("x", value, "s", target).holds is holds


@pytest.mark.parametrize("target", ["1.5", "=> 2", "at least 3", ">= 10 min", ">= x"])
def test_a_target_that_compares_nothing_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        Result("x", 1.0, "s", target)


def test_what_is_no_number_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="speed is nan"):
        Result("speed", float("nan"))


def test_a_part_that_fails_leaves_what_was_measured_before(tmp_path: Path) -> None:
    publish("some", [Result("of an earlier run", 1)], tmp_path)
    report = Report("some", tmp_path)
    report.add([Result("first", np.int64(3))], "part one")
    report.add([Result("second", np.float32(0.5))], "part two")
    with pytest.raises(ValueError, match="measured twice: first"):
        report.add([Result("first", 4)])
    rows = json.loads(report.path.read_text(encoding="utf-8"))
    assert [(row["name"], row["value"]) for row in rows] == [("first", 3), ("second", 0.5)]


def test_the_file_and_the_table_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result("speed", 12.5, "pairs/s", ">= 10"), Result("texts", 300)]
    path = publish("some", results, tmp_path / "results")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [path.name for path in path.parent.iterdir()] == ["some.json"]
    assert [tuple(row) for row in rows] == [("name", "value", "unit", "target", "holds", "machine")] * 2
    assert {name: rows[0][name] for name in ("name", "value", "unit", "target", "holds")} == {
        "name": "speed",
        "value": 12.5,
        "unit": "pairs/s",
        "target": ">= 10",
        "holds": True,
    }
    assert (rows[1]["target"], rows[1]["holds"]) == (None, None)
    assert rows[0]["machine"].keys() == {"cpu", "cores", "memory_gib", "python", "torch"}
    assert rows[0]["machine"]["cores"] >= 1
    assert socket.gethostname() not in path.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "speed" in printed
    assert "12.5" in printed
    assert "yes" in printed


def test_one_name_stands_for_one_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measured twice: a"):
        publish("some", [Result("a", 1), Result("a", 2)], tmp_path)
    assert not list(tmp_path.iterdir())
