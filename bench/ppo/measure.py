"""One round of a case: each side's run, one after another, and what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.ppo.cases import SAMPLES, SAMPLES_PER_PROMPT, Prepared
from bench.ppo.memory import MemoryWatch
from bench.ppo.ours import TIMEOUT_S, Steps, case_overrides, run_ppo
from bench.ppo.workers import THREAD_VARIABLES, Work, Workers

SIZES = {"float32": 4, "bfloat16": 2}
COPIES = 5
ONE_PROCESS, ONE_THREAD = (1, 2), (2, 1)
"""The two ways for a component to use two cores: (processes, threads of each)."""


@dataclass(frozen=True)
class Effort:
    """How long each side runs.

    Attributes:
        steps: of a training run that are measured, after one that is not.
        sampling_steps: the same where a run is there for its generators.
        repeats: of a bare component, after one that is not measured.
    """

    steps: int
    sampling_steps: int
    repeats: int


EFFORT = {"tiny": Effort(6, 8, 5), "smollm2": Effort(3, 3, 2)}


@dataclass(frozen=True)
class Site:
    """Where and how a case is measured.

    Attributes:
        runs: folder for run folders.
        trl: folder that TRL was installed into.
        trl_threads: compute threads of TRL.
        trl_micro_batch: samples in one forward and backward pass of TRL.
        layout: of our roles.
        more: overrides of our runs.
    """

    data: Path
    runs: Path
    trl: Path
    trl_threads: int
    trl_micro_batch: int
    layout: str
    more: Sequence[str]


@dataclass(frozen=True)
class Ours:
    """Our run, and the largest resident size of each process."""

    steps: Steps
    peaks: dict[str, int]


@dataclass(frozen=True)
class TrlSteps:
    """TRL's run."""

    wall_s: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class BareModel:
    """The hand-written passes, by how they were laid out over the cores."""

    train: dict[tuple[int, int], list[Work]]
    reference: dict[tuple[int, int], list[Work]]
    score: dict[tuple[int, int], list[Work]]


def run_ours(prepared: Prepared, site: Site, effort: Effort, layout: str | None = None) -> Ours:
    """A GRPO step of ours."""
    watch = MemoryWatch(site.runs / "bench" / "metrics.jsonl", interval_s=2.0)
    overrides = case_overrides(prepared, layout or site.layout)
    steps = run_ppo("grpo.yaml", site.runs, site.data, effort.steps, overrides, site.more, watch.watch)
    return Ours(steps, watch.peaks)


def run_sampling(prepared: Prepared, site: Site, effort: Effort) -> Steps:
    """A run in which generators have the cores for themselves while they sample, and little is trained."""
    alone = {
        "reference": None,
        "algorithm.kl.coefficient": 0.0,
        "policy.learner.trainable_top_layers": 1,
        "generator.replicas": 2,
        "generator.threads": 1,
        "sampling.prompts_per_shard": 8,
    }
    overrides = {
        key: value
        for key, value in (case_overrides(prepared, site.layout) | alone).items()
        if not key.startswith("reference.")
    }
    return run_ppo("grpo.yaml", site.runs, site.data, effort.sampling_steps, overrides, site.more)


def run_trl(prepared: Prepared, site: Site, effort: Effort, threads: int | None = None) -> TrlSteps:
    """A GRPO step of TRL's, with generation by transformers, as TRL does it where its vLLM is not set up."""
    case, threads = prepared.case, threads or site.trl_threads
    command = [sys.executable, "-m", "bench.ppo.trl_grpo", "--model", str(prepared.model), "--dtype", case.dtype]
    command += ["--reward-model", str(site.data / "tiny" / "reward_model"), "--prompts", str(prepared.prompts)]
    command += ["--samples", str(SAMPLES), "--samples-per-prompt", str(SAMPLES_PER_PROMPT)]
    command += ["--micro-batch", str(site.trl_micro_batch), "--response-tokens", str(case.response_tokens)]
    command += ["--steps", str(effort.steps + 1), "--threads", str(threads)]
    path = os.pathsep.join(filter(None, (str(site.trl.absolute()), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path} | dict.fromkeys(THREAD_VARIABLES, str(threads))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{last}")
    report = json.loads(done.stdout.splitlines()[-1])
    if report["shortest_response"] < case.response_tokens:
        raise RuntimeError(f"TRL's shortest response has {report['shortest_response']} tokens")
    ends = report["step_ends_s"]
    return TrlSteps(tuple(later - earlier for earlier, later in pairwise(ends)), report["peak_bytes"])


def worker_command(prepared: Prepared, site: Site, kind: str) -> tuple[str, list[str]]:
    """Module and command line of a bare component's worker: `engine` or `model`."""
    case = prepared.case
    arguments = ["--model", str(prepared.model), "--prompts", str(prepared.prompts), "--dtype", case.dtype]
    arguments += ["--samples", str(SAMPLES), "--samples-per-prompt", str(SAMPLES_PER_PROMPT)]
    arguments += ["--response-tokens", str(case.response_tokens)]
    if kind == "model":
        arguments += ["--reward-model", str(site.data / "tiny" / "reward_model")]
        arguments += ["--micro-batch", str(case.micro_batch_samples)]
    return f"bench.ppo.bare_{kind}", arguments


def run_bare_engine(prepared: Prepared, site: Site, effort: Effort) -> list[Work]:
    """`LLM.generate` in two processes of one thread, half of the samples each."""
    with Workers(*worker_command(prepared, site, "engine"), *ONE_THREAD) as workers:
        return _repeated(workers, "generate", effort.repeats)


def run_bare_model(prepared: Prepared, site: Site, effort: Effort) -> BareModel:
    """Forward and training passes, as one process of two threads and as two of one."""
    found = BareModel({}, {}, {})
    for shape in (ONE_PROCESS, ONE_THREAD):
        with Workers(*worker_command(prepared, site, "model"), *shape) as workers:
            found.reference[shape] = _repeated(workers, "reference", effort.repeats)
            found.score[shape] = _repeated(workers, "score", effort.repeats)
            found.train[shape] = _repeated(workers, "train", effort.repeats)
    return found


def run_copy(prepared: Prepared) -> float:
    """Seconds that NumPy takes to copy the bytes of all weights once, into fresh memory."""
    source = np.ones(prepared.parameters * SIZES[prepared.case.dtype], dtype=np.uint8)
    times = []
    for _ in range(COPIES):
        started = time.perf_counter()
        source.copy()
        times.append(time.perf_counter() - started)
    return sorted(times)[COPIES // 2]


def _repeated(workers: Workers, task: str, repeats: int) -> list[Work]:
    workers.run(task)
    return [workers.run(task) for _ in range(repeats)]
