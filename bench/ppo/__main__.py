"""`python -m bench.ppo --trl FOLDER`: all comparisons, or those of `--parts`; see `bench/ppo/__init__.py`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.ppo.cases import CASES, LAYOUTS, Case, Prepared, prepare
from bench.ppo.figures import CORES, PARTS, Rounds, layout_results
from bench.ppo.measure import (
    EFFORT,
    Effort,
    Site,
    run_bare_engine,
    run_bare_model,
    run_copy,
    run_ours,
    run_sampling,
    run_trl,
    worker_command,
)
from bench.ppo.memory import memory_results, memory_runs
from bench.ppo.workers import environment
from bench.results import Report
from rlhf_ray.models.loading import cpu_has_bf16

FILES = Path(".bench/ppo")
QUICK = Effort(steps=2, sampling_steps=2, repeats=2)
PROFILES = {"generator": ("engine", "generate"), "reference": ("model", "reference"), "learner": ("model", "train")}


def measure_case(prepared: Prepared, site: Site, effort: Effort, parts: Sequence[str], number: int) -> Rounds:
    """The rounds of one case; within a round each side has its turn."""
    sides: dict[str, Callable[[], object]] = {
        "trl": lambda: run_trl(prepared, site, effort),
        "ours": lambda: run_ours(prepared, site, effort),
        "engine": lambda: run_bare_engine(prepared, site, effort),
        "sampling": lambda: run_sampling(prepared, site, effort),
        "model": lambda: run_bare_model(prepared, site, effort),
        "copies_s": lambda: run_copy(prepared),
    }
    needed = {name for part in parts for name in PARTS[part].needs}
    rounds = Rounds()
    for index in range(1, number + 1):
        for name, run in sides.items():
            if name in needed:
                print(f"{prepared.case.name}, round {index} of {number}: {name}", flush=True)
                getattr(rounds, name).append(run())
    return rounds


def best_trl_threads(prepared: Prepared, site: Site, effort: Effort, candidates: Sequence[int]) -> int:
    """The number of threads with which TRL is fastest; tried only where there is a choice."""
    if len(candidates) == 1:
        return candidates[0]
    short = replace(effort, steps=1)
    steps = {threads: median(run_trl(prepared, site, short, threads).wall_s) for threads in candidates}
    print(f"{prepared.case.name}: a step of TRL by threads: {steps}", flush=True)
    return min(steps, key=steps.__getitem__)


def compare_layouts(
    prepared: Prepared, site: Site, effort: Effort, layouts: Sequence[str], number: int
) -> dict[str, list[float]]:
    """Our step in each layout, in alternation."""
    steps: dict[str, list[float]] = {name: [] for name in layouts}
    for index in range(1, number + 1):
        for name in layouts:
            print(f"{prepared.case.name}, round {index} of {number}: {name} ({LAYOUTS[name].why})", flush=True)
            steps[name].append(median(run_ours(prepared, site, effort, name).steps.wall_s))
    return steps


def print_profile(prepared: Prepared, site: Site, role: str) -> None:
    """Where a bare component spends its time, in the operators of one thread."""
    kind, task = PROFILES[role]
    module, arguments = worker_command(prepared, site, kind)
    command = [sys.executable, "-m", module, *arguments, "--share", "2", "--threads", "1", "--profile", task]
    subprocess.run(command, env=os.environ | environment(1), check=True)


def main() -> None:
    arguments = _parse()
    # Both sides, and all that they start, have these cores and no others.
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        raise SystemExit(f"this machine has {len(cores)} core; the comparisons are laid out for {CORES}")
    os.sched_setaffinity(0, cores)
    # So that a run or worker under way is ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = Report("ppo")
    FILES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as runs:
        site = Site(
            data=arguments.data,
            runs=Path(runs),
            trl=arguments.trl,
            trl_threads=arguments.trl_threads[0],
            trl_micro_batch=arguments.trl_micro_batch,
            layout="",
            more=arguments.overrides,
        )
        for case in _chosen_cases(arguments):
            _run_case(case, site, arguments, report)
        if "memory" in arguments.parts:
            _measure_memory(site, arguments, report)


def _run_case(case: Case, site: Site, arguments: argparse.Namespace, report: Report) -> None:
    prepared = prepare(case, arguments.data, FILES)
    effort = QUICK if arguments.quick else EFFORT[case.model]
    site = replace(site, layout=arguments.layout or case.layout)
    if arguments.profile:
        print_profile(prepared, site, arguments.profile)
        return
    compared = [part for part in arguments.parts if part in PARTS]
    if "trl" in compared:
        site = replace(site, trl_threads=best_trl_threads(prepared, site, effort, arguments.trl_threads))
    rounds = measure_case(prepared, site, effort, compared, arguments.rounds)
    for part in compared:
        report.add(PARTS[part].results(case, rounds), f"{part}, {case.name}")
    if "layouts" in arguments.parts:
        layouts = [arguments.layout] if arguments.layout else list(LAYOUTS)
        steps = compare_layouts(prepared, site, effort, layouts, arguments.rounds)
        report.add(layout_results(case, steps), f"layouts, {case.name}")


def _measure_memory(site: Site, arguments: argparse.Namespace, report: Report) -> None:
    case = next(case for case in CASES if case.model == arguments.memory_model and case.dtype == "float32")
    prepared = prepare(case, arguments.data, FILES)
    for run in memory_runs(arguments.memory_steps):
        print(f"memory, {run.name}: {run.steps + 1} steps", flush=True)
        report.add(memory_results(run, prepared, site.runs, site.data, site.more), f"memory, {run.name}")


def _chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    chosen = [case for case in CASES if case.model in arguments.models and case.dtype in arguments.dtypes]
    without = [case for case in chosen if case.dtype == "bfloat16" and not cpu_has_bf16()]
    for case in without:
        print(f"{case.name}: left out, this CPU has no bf16 instructions", flush=True)
    return [case for case in chosen if case not in without]


def _parse() -> argparse.Namespace:
    everything = (*PARTS, "memory")
    parser = argparse.ArgumentParser(prog="python -m bench.ppo", description="A PPO step against its peers and parts.")
    parser.add_argument("--trl", type=Path, required=True, help="folder that TRL was installed into (pip --target)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with tiny and smollm2-135m")
    _add_names(parser, "--parts", (*everything, "layouts"), "default: all but layouts")
    _add_names(parser, "--models", ("tiny", "smollm2"), "default: both")
    _add_names(parser, "--dtypes", ("float32", "bfloat16"), "default: both, where the CPU has bfloat16")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="the small model, one short round, no memory")
    parser.add_argument("--layout", choices=LAYOUTS, help="of our roles, in place of each case's own")
    parser.add_argument("--trl-threads", default="2", help="such as 1,2: the fastest is found and used")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="samples in one pass of TRL, of 64")
    parser.add_argument("--memory-model", choices=("tiny", "smollm2"), default="smollm2")
    parser.add_argument("--memory-steps", type=int, default=60, help="of the run that looks for growth")
    parser.add_argument("--profile", choices=PROFILES, help="print where a bare component spends its time, and end")
    parser.add_argument("overrides", nargs="*", help="settings of our runs, section.key=value")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(PARTS if arguments.quick else everything)
    arguments.models = arguments.models or (["tiny"] if arguments.quick else ["tiny", "smollm2"])
    arguments.dtypes = arguments.dtypes or ["float32", "bfloat16"]
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.trl_threads = [int(count) for count in arguments.trl_threads.split(",")]
    return arguments


def _add_names(parser: argparse.ArgumentParser, option: str, known: Sequence[str], meaning: str) -> None:
    """An option that takes several of the known names, with commas between them."""

    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; available: {', '.join(known)}")
        return text.split(",")

    parser.add_argument(option, type=names, metavar="NAME,…", help=f"of {', '.join(known)}; {meaning}")


if __name__ == "__main__":
    main()
