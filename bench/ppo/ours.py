"""Our side: the command `rlhf-ray ppo`, measured by the files that it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.ppo.cases import LAYOUTS, Prepared

FOLDER = Path(__file__).parent
TIMEOUT_S = 5400.0


@dataclass(frozen=True)
class Steps:
    """The measured steps of one run.

    Attributes:
        wall_s: of each step, from the end of the one before to its own: also what happens between steps.
        rows: of `metrics.jsonl`, of the same steps.
        busy: what each role did in the traced step, by role and method.
    """

    wall_s: tuple[float, ...]
    rows: tuple[Mapping[str, float | None], ...]
    busy: Mapping[str, Mapping[str, Busy]] = field(default_factory=dict)

    def metric(self, name: str) -> list[float]:
        """One value a step, where the run has that metric."""
        return [float(value) for row in self.rows if (value := row.get(name)) is not None]


@dataclass(frozen=True)
class Busy:
    """Calls of one method of one role in a step.

    Attributes:
        wall_s: sum of their durations.
        cpu_s: CPU seconds that they used.
    """

    calls: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Busy) -> Busy:
        return Busy(self.calls + other.calls, self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


def case_overrides(prepared: Prepared, layout: str) -> dict[str, Any]:
    """What makes `grpo.yaml` this case in this layout."""
    case = prepared.case
    return {
        "prompts.path": prepared.prompts.absolute(),
        "policy.model": prepared.model.absolute(),
        "policy.learner.dtype": case.dtype,
        "reference.dtype": case.dtype,
        "generator.dtype": case.dtype,
        "sampling.max_response_tokens": case.response_tokens,
        "policy.learner.micro_batch_tokens": case.micro_batch_samples * prepared.sequence_tokens,
        "reference.micro_batch_tokens": case.micro_batch_samples * prepared.sequence_tokens,
        **LAYOUTS[layout].overrides,
    }


def run_ppo(
    config: str,
    runs: Path,
    data: Path,
    steps: int,
    overrides: Mapping[str, Any],
    more: Sequence[str] = (),
    watch: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Steps:
    """One run, without its first step, which pays what is paid once.

    Args:
        config: file beside this one.
        steps: to measure; one more is run.
        more: overrides from the command line, `section.key=value`.
        watch: called with the process while it runs, until it returns.

    Raises:
        RuntimeError: the run failed, or a response ended before the limit: then the work was not the same.
    """
    name = "bench"
    folder = runs / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"paths.runs": runs.absolute(), "paths.data": data.absolute(), "steps": steps + 1, **overrides}
    # A value is quoted as JSON, which YAML reads: a path may hold anything.
    values = [
        f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in settings.items()
    ]
    command = [sys.executable, "-m", "rlhf_ray", "ppo", str(FOLDER / config), f"run.name={name}", *values, *more]
    output = runs / "ppo.log"
    with output.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=_environment())
        try:
            if watch is not None:
                watch(process)
            status = process.wait(TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(120)
    if status:
        last = "\n".join(output.read_text(encoding="utf-8").splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{last}")
    return read_steps(folder, steps)


def read_steps(folder: Path, steps: int) -> Steps:
    """The last steps of a finished run."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if len(rows) != steps + 1:
        raise RuntimeError(f"{len(rows)} steps in {folder} where {steps + 1} were asked for")
    if min(row["response/truncated_fraction"] for row in rows) < 1:
        raise RuntimeError(f"responses ended before the limit in {folder}: the sides did not do the same work")
    walls = tuple(later["wall_s"] - earlier["wall_s"] for earlier, later in pairwise(rows))
    trace = folder / "trace.json"
    return Steps(walls, tuple(rows[1:]), read_trace(trace) if trace.exists() else {})


def read_trace(path: Path) -> dict[str, dict[str, Busy]]:
    """Busy time by role and method from a Chrome trace: complete events, processes named by metadata."""
    document = json.loads(path.read_text(encoding="utf-8"))
    events = document["traceEvents"] if isinstance(document, dict) else document
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    busy: dict[str, dict[str, Busy]] = defaultdict(lambda: defaultdict(Busy))
    for event in events:
        if event["ph"] == "X":
            role = str(names.get(event["pid"], event["pid"]))
            used = float(event.get("args", {}).get("cpu_s", 0.0))
            busy[role][event["name"]] += Busy(1, event["dur"] / 1e6, used)
    return {role: dict(methods) for role, methods in busy.items()}


def _environment() -> dict[str, str]:
    """Ours sizes its own thread pools."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
