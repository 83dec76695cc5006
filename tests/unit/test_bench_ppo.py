"""The arithmetic of `bench.ppo`: which process time and memory are attributed to, and what is divided by what."""

import json
from pathlib import Path

import pytest

from bench.ppo.cases import CASES
from bench.ppo.figures import PARTS, Rounds, floor_results, learner_results, trl_results
from bench.ppo.measure import BareModel, Ours, TrlSteps
from bench.ppo.memory import Sample, computed_results, growth_results, peak_results
from bench.ppo.ours import Busy, Steps, read_steps, read_trace
from bench.ppo.workers import Work
from rlhf_ray.config.load import dump_config, load_config
from rlhf_ray.config.settings import PPOConfig
from tests.conftest import REPOSITORY

TINY = CASES[0]


def test_a_trace_gives_each_role_its_busy_time(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "policy-0"}},
        {"ph": "X", "name": "train", "pid": 7, "ts": 0, "dur": 2_000_000, "args": {"cpu_s": 1.5}},
        {"ph": "X", "name": "train", "pid": 7, "ts": 3_000_000, "dur": 1_000_000, "args": {"cpu_s": 0.5}},
        {"ph": "X", "name": "generate", "pid": "generator-0", "ts": 0, "dur": 500_000, "args": {}},
    ]
    expected = {"policy-0": {"train": Busy(2, 3.0, 2.0)}, "generator-0": {"generate": Busy(1, 0.5, 0.0)}}
    for document in (events, {"traceEvents": events}):
        path = tmp_path / "trace.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        assert read_trace(path) == expected


def test_a_step_lasts_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    rows = [{"wall_s": wall, "response/truncated_fraction": 1.0} for wall in (50.0, 53.0, 57.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_steps(tmp_path, 2).wall_s == (3.0, 4.0)
    rows[1]["response/truncated_fraction"] = 0.9
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(RuntimeError, match="ended before the limit"):
        read_steps(tmp_path, 2)


def _work(wall_s: float, cpu_s: float) -> list[Work]:
    return [Work(wall_s, cpu_s, 10**9)]


def _rounds() -> Rounds:
    row = {"time/train_s": 1.0, "time/sync_s": 0.1}
    one_process, one_thread = (1, 2), (2, 1)
    model = BareModel(
        train={one_process: _work(0.9, 1.7), one_thread: _work(0.8, 1.6)},
        reference={one_process: _work(0.2, 0.3), one_thread: _work(0.2, 0.4)},
        score={one_process: _work(0.1, 0.1), one_thread: _work(0.1, 0.1)},
    )
    return Rounds(
        trl=[TrlSteps((4.0, 4.0), 1)],
        ours=[Ours(Steps((2.0, 2.0), (row, row)), {"policy-0": 2 * 10**9, "policy-1": 10**9, "generator-0": 1})],
        engine=[_work(0.5, 1.0)],
        model=[model],
    )


def test_ratios_say_how_many_times_as_good_we_are() -> None:
    values = {
        result.name: result.value
        for part in (trl_results, learner_results, floor_results)
        for result in part(TINY, _rounds())
    }
    assert values["tiny float32: ours over TRL"] == 2.0
    assert values["tiny float32: learner over the loop"] == pytest.approx(0.9)
    assert values["tiny float32: our learner, peak of all ranks"] == 3.0
    # (1.0 + 0.3 + 0.1 + 1.6) core-seconds on two cores.
    assert values["tiny float32: floor of a step"] == pytest.approx(1.5)
    assert values["tiny float32: step over its floor"] == pytest.approx(2.0 / 1.5)


def test_every_need_of_a_part_is_measured() -> None:
    assert {name for part in PARTS.values() for name in part.needs} <= set(vars(Rounds()))


def test_memory_adds_up_at_one_time_and_grows_between_windows() -> None:
    def sample(step: int, policy: int, critic: int) -> Sample:
        own = {"policy-0": policy, "critic-0": critic}
        return Sample(step, own, own)

    gb = 10**9
    peaks = [sample(1, 5 * gb, 1 * gb), sample(2, 2 * gb, 3 * gb)]
    assert [result.value for result in peak_results("x", peaks)] == [3.0, 5.0, 6.0]
    grown = [sample(step, 100 + (step >= 50), 100) for step in range(60)]
    assert {result.name: result.value for result in growth_results("x", grown, 60)} == {
        "x: policy-0, growth": pytest.approx(1.0),
        "x: critic-0, growth": pytest.approx(0.0),
    }
    assert growth_results("x", grown[:20], 20) == []


def test_computed_peaks_are_compared_with_the_measured_ones_of_the_same_role(tiny: Path, tmp_path: Path) -> None:
    config = load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", [f"paths.data={tiny.parent}"])
    (tmp_path / "config.yaml").write_text(dump_config(config), "utf-8")
    # Half a gigabyte a process is about what the tiny roles need.
    sizes = {"policy-0": 5 * 10**8, "policy-1": 10**9, "driver": 10**9}
    [result] = computed_results("x", [Sample(1, sizes, sizes)], tmp_path / "config.yaml")
    assert (result.name, result.target) == ("x: policy-0, computed peak is off by", "<= 15 %")
    assert 0 < result.value < 15
