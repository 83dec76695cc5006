"""Engines on the GPUs of learners: where Ray puts them, and when they sleep. Roles are stubs, GPUs are numbers."""

from pathlib import Path

import pytest

from bench.many_nodes import Process
from tests.system.commands import start

pytestmark = pytest.mark.timeout(300)


def test_each_engine_is_on_the_gpu_of_one_rank_and_sleeps_while_it_learns(tmp_path: Path) -> None:
    command = start((str(tmp_path),), tmp_path / "output", module="tests.system.shared_gpus")
    command.wait(240)
    assert command.process.returncode == 0, command.stderr
    processes = [Process.read(path) for path in (tmp_path / "facts").glob("*.jsonl")]
    gpus: dict[str, list[list[int]]] = {}
    for process in processes:
        gpus.setdefault(process.role, []).append(process.place["gpus"])
    assert sorted(gpus.pop("generator")) == sorted(gpus.pop("policy")) == [[0], [1]]
    assert gpus == {"reward": [[]], "reference": [[]], "critic": [[]]}
    bundles = {role: {each.bundle for each in processes if each.role == role} for role in ("generator", "policy")}
    assert bundles["generator"] == bundles["policy"] == {0, 1}
    for engine in (process for process in processes if process.role == "generator"):
        # A stub loads at every call what it has already.
        told = dict.fromkeys((fact["kind"], fact.get("version", fact.get("had"))) for fact in engine.facts)
        assert list(told) == [
            *(("loaded", 0), ("sampled", 0), ("slept", 0)),
            *(("loaded", 1), ("sampled", 1), ("slept", 1)),
            ("loaded", 2),
        ]
