"""Processes that do a bare component's work on request: one line in, one JSON line out.

A worker prints one line when it has loaded its model, then one for each task that it reads, and ends with its input.
So several of them can start together and compute at the same time, as replicas of a role do.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import IO, Any

READY = "ready"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Work:
    """One task of one process, or of several that worked side by side.

    Attributes:
        wall_s: of the slowest.
        cpu_s: CPU seconds of all.
        peak_bytes: largest resident size so far, summed over the processes.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def serve(tasks: Mapping[str, Callable[[], object]]) -> None:
    """A worker's main loop over its standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _say(answers, READY)
    for line in sys.stdin:
        task = tasks[line.strip()]
        wall, cpu = time.perf_counter(), time.process_time()
        task()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _say(answers, json.dumps(asdict(Work(wall, cpu, peak))))


def _say(answers: IO[str], line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


class Workers:
    """Copies of one worker, each with threads of its own.

    Args:
        module: `python -m` of it.
        arguments: of the command line, the same for all but `--share`.
        processes: each is told its share of the work, `--share 1/processes`.
        threads: of each.
    """

    def __init__(self, module: str, arguments: Sequence[str], processes: int, threads: int) -> None:
        command = [sys.executable, "-m", module, *arguments, "--share", str(processes), "--threads", str(threads)]
        self._stack = ExitStack()
        self._processes = [
            self._stack.enter_context(
                subprocess.Popen(
                    command,
                    env=os.environ | environment(threads),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for _ in range(processes)
        ]

    def __enter__(self) -> Workers:
        for process in self._processes:
            self._read(process, until=READY)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        self._stack.close()

    def run(self, task: str) -> Work:
        """The same task in all of them at once."""
        started = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None, "opened with a pipe"
            process.stdin.write(task + "\n")
            process.stdin.flush()
        each = [Work(**json.loads(self._read(process))) for process in self._processes]
        return Work(
            wall_s=time.perf_counter() - started,
            cpu_s=sum(work.cpu_s for work in each),
            peak_bytes=sum(work.peak_bytes for work in each),
        )

    def _read(self, process: subprocess.Popen[str], until: str | None = None) -> str:
        assert process.stdout is not None, "opened with a pipe"
        for line in process.stdout:
            if until is None or line.strip() == until:
                return line
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with status {process.wait()}")  # type: ignore[arg-type]


def environment(threads: int) -> dict[str, str]:
    """Of a bare component: what costs it nothing to have, so that it is as fast as it can be."""
    keep = str(4 << 30)
    return {
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        # As the roles have it: glibc otherwise gives every large tensor's pages back and faults them in again.
        "MALLOC_MMAP_THRESHOLD_": keep,
        "MALLOC_TRIM_THRESHOLD_": keep,
        "MALLOC_TOP_PAD_": str(64 << 20),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def worker_arguments(parser: Any) -> None:
    """What every worker's command line has."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSONL with prompt, all of one length in tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--samples", type=int, required=True, help="of a step, over all processes")
    parser.add_argument("--samples-per-prompt", type=int, required=True)
    parser.add_argument("--response-tokens", type=int, required=True)
    parser.add_argument("--share", type=int, default=1, help="processes that share the work evenly")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", metavar="TASK", help="run a task twice, print where its time goes, and end")


def profile(task: Callable[[], object]) -> None:
    """Print the operators that a task spends its time in, after a first run that warms up."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    task()
    with recorded(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        task()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
