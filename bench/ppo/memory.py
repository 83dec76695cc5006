"""Memory of a run's processes, each under the name of its role."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.ppo.cases import SAMPLES_PER_PROMPT, Prepared
from bench.ppo.ours import run_ppo
from bench.results import Result
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.models.policy import read_policy
from rlhf_ray.ppo.inputs import source_keys
from rlhf_ray.preflight.needs import ppo_needs
from rlhf_ray.reward.core.source import RewardSource

DRIVER, RAY = "driver", "Ray's own"
SETTLED_STEP = 10
WINDOW_STEPS = 10
"""Growth is from the peak of so many steps after the settled one to the peak of as many at the end."""
_KIB = 1024
_OFTEN_S = 0.05


@dataclass(frozen=True)
class Sample:
    """One look at all processes of a run.

    Attributes:
        step: steps that were finished.
        shared: bytes by process, pages that several have divided among them (PSS): they add up to what is in use.
        private: bytes by process that nobody else has: the most since the look before.
    """

    step: int
    shared: Mapping[str, int]
    private: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.shared.values())


class MemoryWatch:
    """Looks at a run's processes while it runs; hand `watch` to `run_ppo`.

    Args:
        metrics: the run's `metrics.jsonl`, whose lines are the finished steps.
        interval_s: between two looks. In between, anonymous memory is read often, which costs next to nothing: the most
            that a process needs in a step, it needs for a moment.
        pages: whether to count pages (`samples`), which stops a process for some milliseconds; else only the kernel's
            own note of the largest resident size is read (`peaks`).
    """

    def __init__(self, metrics: Path, interval_s: float = 1.0, pages: bool = False) -> None:
        self._metrics, self._interval_s, self._pages = metrics, interval_s, pages
        self.peaks: dict[str, int] = {}
        self.samples: list[Sample] = []

    def watch(self, process: subprocess.Popen[str]) -> None:
        """Until the process ends."""
        while process.poll() is None:
            found = dict(_processes(process.pid))
            for pid, name in found.items():
                if resident := _fields(f"/proc/{pid}/status").get("VmHWM"):
                    self.peaks[name] = max(self.peaks.get(name, 0), resident)
            if self._pages:
                self._count_pages(found)
            else:
                time.sleep(self._interval_s)

    def _count_pages(self, found: Mapping[int, str]) -> None:
        private: dict[str, int] = {}
        ends = time.monotonic() + self._interval_s
        while time.monotonic() < ends:
            own: dict[str, int] = {}
            for pid, name in found.items():
                own[name] = own.get(name, 0) + _fields(f"/proc/{pid}/status").get("RssAnon", 0)
            private = {name: max(own[name], private.get(name, 0)) for name in own}
            time.sleep(_OFTEN_S)
        shared: dict[str, int] = {}
        for pid, name in found.items():
            shared[name] = shared.get(name, 0) + _fields(f"/proc/{pid}/smaps_rollup").get("Pss", 0)
        steps = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        self.samples.append(Sample(steps, shared, private))


def _processes(driver: int) -> Iterator[tuple[int, str]]:
    """Process ids of a run's tree with their names; a role's process prints into the log file of its name."""
    yield driver, DRIVER
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in children:
        try:
            output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
        except OSError:
            continue
        is_role = output.parent.name == "logs" and re.fullmatch(r"[a-z_]+-\d+", output.stem) is not None
        yield process.pid, output.stem if is_role else RAY


def _fields(path: str) -> dict[str, int]:
    """Bytes by name, from a file of the kernel with lines such as `Pss: 1 kB`; empty where the process has gone."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = (re.match(r"(\w+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) * _KIB for match in found if match}


@dataclass(frozen=True)
class MemoryRun:
    """One run of all roles.

    Attributes:
        steps: after the first.
        prompts: of a step, with four samples each.
        mixed: they are of all lengths, and not of one.
    """

    name: str
    steps: int
    prompts: int
    mixed: bool


def memory_runs(growth_steps: int) -> tuple[MemoryRun, ...]:
    """The peak is of steps of 64 samples; growth is of many small ones, whose packs are as large, and of new lengths:
    what is kept for each shape is what a process may grow by."""
    return MemoryRun("peak", 5, 16, mixed=False), MemoryRun("growth", growth_steps - 1, 4, mixed=True)


def memory_results(
    run: MemoryRun, prepared: Prepared, runs: Path, data: Path, more: Sequence[str] = ()
) -> list[Result]:
    """Peak and growth of one run, in GB of 10⁹ bytes."""
    watch = MemoryWatch(runs / "bench" / "metrics.jsonl", pages=True)
    overrides = {
        "prompts.path": (_mixed(prepared.prompts, runs) if run.mixed else prepared.prompts).absolute(),
        "policy.model": prepared.model.absolute(),
        "sampling.prompts_per_step": run.prompts,
        "sampling.prompts_per_shard": run.prompts // 2,
        "sampling.samples_per_prompt": SAMPLES_PER_PROMPT,
        "sampling.max_response_tokens": prepared.case.response_tokens,
    }
    run_ppo("memory.yaml", runs, data, run.steps, overrides, more, watch.watch)
    label = f"{prepared.case.model} float32, {run.prompts * SAMPLES_PER_PROMPT} samples"
    results = peak_results(label, watch.samples) + growth_results(label, watch.samples, run.steps + 1)
    return results + computed_results(label, watch.samples, runs / "bench" / "config.yaml")


def _mixed(prompts: Path, folder: Path) -> Path:
    """The same prompts, cut to one word and more."""
    words = [json.loads(line)["prompt"].split() for line in prompts.read_text("utf-8").splitlines()]
    cut = [" ".join(each[: 1 + index % len(each)]) for index, each in enumerate(words)]
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in cut), encoding="utf-8")
    return path


def peak_results(label: str, samples: Sequence[Sample]) -> list[Result]:
    """The most of each process at any time, and of all together at one time."""
    names = sorted({name for sample in samples for name in sample.shared})
    results = [
        Result(f"{label}: {name}, peak", max(sample.shared.get(name, 0) for sample in samples) / 1e9, "GB")
        for name in names
    ]
    return [*results, Result(f"{label}: all, peak", max(sample.total for sample in samples) / 1e9, "GB", "<= 12 GB")]


def computed_results(label: str, samples: Sequence[Sample], config_yaml: Path) -> list[Result]:
    """How far the peaks that `rlhf-ray preflight` computes are from those of each role."""
    config = load_config(PPOConfig, config_yaml)
    rewards = [RewardSource.read(source, key) for source, key in zip(config.reward, source_keys(config), strict=True)]
    results = []
    for need in ppo_needs(config, read_policy(config.policy), rewards, unread=()):
        name = f"{need.request.role}-0"
        measured = max((sample.shared.get(name, 0) for sample in samples), default=0)
        if measured and need.memory is not None:
            apart = 100 * abs(need.memory.first_bytes / measured - 1)
            results.append(Result(f"{label}: {name}, computed peak is off by", apart, "%", "<= 15 %"))
    return results


def growth_results(label: str, samples: Sequence[Sample], steps: int) -> list[Result]:
    """Growth of each role's own memory after it has settled; nothing where the run was too short to tell."""
    if steps < SETTLED_STEP + 2 * WINDOW_STEPS:
        return []
    early = [sample for sample in samples if SETTLED_STEP <= sample.step < SETTLED_STEP + WINDOW_STEPS]
    late = [sample for sample in samples if steps - WINDOW_STEPS <= sample.step < steps]
    # Only processes that live all the time.
    names = sorted(set.intersection(*(set(sample.private) for sample in early + late)) - {RAY})

    def peak(chosen: Sequence[Sample], name: str) -> int:
        return max(sample.private[name] for sample in chosen)

    return [
        Result(f"{label}: {name}, growth", 100 * (peak(late, name) / peak(early, name) - 1), "%", "< 2 %")
        for name in names
    ]
