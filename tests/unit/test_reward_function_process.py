"""Whatever a function does to its process, each sample gets a finite number or a cause, and the next call works."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.function_child import Batch, Failed
from rlhf_ray.reward.core.function_process import FunctionProcess
from tests.conftest import REPOSITORY

HERE = "tests.unit.reward_functions"
PATH = [str(REPOSITORY)]
TIMEOUT_S = 60.0


def batch(count: int, response: str = "a") -> Batch:
    return Batch(["p"] * count, [response] * count, ["a"] * count, [1] * count, [False] * count)


def process(name: str) -> FunctionProcess:
    return FunctionProcess(f"{HERE}:{name}", PATH)


def outcomes(name: str, count: int = 2, timeout_s: float = TIMEOUT_S) -> list:
    with process(name) as started:
        return started.call(batch(count), timeout_s)


def test_a_function_scores_in_a_process_of_its_own_that_keeps_its_state():
    with process("number_of_calls") as started:
        assert [started.call(batch(2), TIMEOUT_S) for _ in range(2)] == [[1.0, 1.0], [2.0, 2.0]]
    assert outcomes("exact") == [1.0, 1.0]


def test_the_function_gets_the_lists_it_names(capfd):
    given = Batch(["p", [{"role": "user", "content": "q"}]], ["a", "b"], [{"answer": 3}, None], [5, 7], [False, True])
    with process("what_it_gets") as started:
        assert started.call(given, TIMEOUT_S) == [5.0, 7.0]
    assert repr(tuple(vars(given).values())) in capfd.readouterr().out
    assert outcomes("everything") == [5.0, 5.0]


def test_only_finite_numbers_are_scores():
    *scores, nan, inf, text, nothing, several, other = outcomes("each_kind", 10)
    assert scores == [1.0, 0.5, 1.0, 0.25]
    assert all(type(score) is float for score in scores)
    assert [each.cause for each in (nan, inf, text, nothing, several)] == [
        "each_kind returned nan as a score",
        "each_kind returned inf as a score",
        "each_kind returned '1.0' as a score",
        "each_kind gave no score",
        "each_kind returned [1.0] as a score",
    ]
    assert "as a score" in other.cause


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("raises", "raises raised ValueError: no number in the response"),
        ("exits", "exits raised SystemExit: enough"),
        ("dies", "dies ended its process (exit status 3)"),
        ("is_killed", "is_killed ended its process (killed by SIGKILL)"),
        ("one_too_many", "one_too_many returned 3 scores for 2 samples"),
        ("single", "single returned 1.0, not a list of scores"),
        ("mapping", "mapping returned {'score': 1.0}, not a list of scores"),
    ],
)
def test_a_call_that_fails_is_a_cause_for_each_of_its_samples(name, cause):
    assert outcomes(name) == [Failed(cause), Failed(cause)]


@pytest.mark.parametrize("name", ["hangs", "spins"])
def test_a_call_that_overruns_its_deadline_is_ended(name):
    with process(name) as started:
        began = time.monotonic()
        assert started.call(batch(1), 1.0) == [Failed(f"{name} did not return within 1 s")]
        assert 1.0 <= time.monotonic() - began < 30.0
        assert not started.is_running


def test_after_a_lost_process_the_next_call_has_a_fresh_one():
    with process("number_of_calls") as started:
        assert started.call(batch(1), TIMEOUT_S) == [1.0]
        assert started.call(batch(1), TIMEOUT_S) == [2.0]
        started.close()
        assert started.call(batch(1), TIMEOUT_S) == [1.0]


def test_what_a_function_prints_disturbs_nothing(capfd):
    assert outcomes("prints") == [1.0, 1.0]
    assert capfd.readouterr().out.count("y") == 300_000


def processes_of(path: Path) -> list[psutil.Process]:
    deadline = time.monotonic() + TIMEOUT_S
    while not (path.exists() and len(path.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for pid in path.read_text().split()]


def test_a_hang_is_ended_with_all_that_the_function_started(tmp_path):
    file = tmp_path / "pids"
    with process("hangs_with_a_child") as started:
        [failed] = started.call(batch(1, str(file)), 3.0)
    assert isinstance(failed, Failed)
    pids = [int(pid) for pid in file.read_text().split()]
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_a_hanging_function_does_not_outlive_whoever_called_it(tmp_path):
    file = tmp_path / "pids"
    program = f"""
from tests.unit.test_reward_function_process import batch, process
process("hangs_with_a_child").call(batch(1, {str(file)!r}), 600)
"""
    caller = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": PATH[0]}
    )
    left = processes_of(file)
    caller.kill()
    caller.wait()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert [each for each in alive if each.status() != "zombie"] == []


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("no_such_module:f", "'no_such_module' cannot be imported (ModuleNotFoundError: No module named"),
        (f"{HERE}:no_such_function", f"'{HERE}' has no function 'no_such_function'"),
        (f"{HERE}:not_callable", "has no function 'not_callable'"),
        (f"{HERE}:as_trl_has_it", "it needs 'completions', which is not given"),
        ("raising:f", "'raising' cannot be imported (RuntimeError: at import)"),
        ("exiting:f", "'exiting' cannot be imported (SystemExit: 5)"),
        ("dying:f", "its process ended while it was imported (exit status 7)"),
        ("hanging:f", "not imported within 3 s"),
    ],
)
def test_a_function_that_cannot_be_had_is_bad_input(tmp_path, function, found, capfd):
    (tmp_path / "raising.py").write_text("raise RuntimeError('at import')")
    (tmp_path / "exiting.py").write_text("import sys; sys.exit(5)")
    (tmp_path / "dying.py").write_text("import os; os._exit(7)")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    timeout_s = 3.0 if function == "hanging:f" else TIMEOUT_S
    with pytest.raises(BadInput) as raised:
        FunctionProcess(function, [*PATH, str(tmp_path)], "reward.1.function", start_timeout_s=timeout_s, silent=True)
    assert raised.value.where == "reward.1.function"
    assert found in raised.value.found
    assert capfd.readouterr() == ("", "")


def test_the_version_follows_the_file(tmp_path):
    versions = []
    for number in (1, 2, 1):
        (tmp_path / "mine.py").write_text(f"def f(responses): return [{number}]")
        with FunctionProcess("mine:f", [str(tmp_path)], environment={"PYTHONDONTWRITEBYTECODE": "1"}) as started:
            versions.append(started.version)
            assert started.call(batch(1), TIMEOUT_S) == [float(number)]
    assert versions[0] == versions[2] != versions[1]
    assert all(version.startswith("mine:f@") for version in versions)
