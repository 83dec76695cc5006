"""Runs that something happens to, and what they leave."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults import Fault
from tests.system.commands import PPO, REPOSITORY, Command, rows_of, start_program, user_environment, without_times

SILENT_S = 20.0
DEADLINE_S = 900.0


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        status: of the command.
        error: last line of what it said on stderr.
        rows: its metrics, except times.
        digests: SHA-256 of the trained weights, of the judged samples, and of the ledger.
        events: as written.
        wall_s: when each step was done, in seconds since the run was taken up.
    """

    status: int
    error: str
    rows: list[dict[str, Any]]
    digests: dict[str, str]
    events: list[dict[str, Any]]
    wall_s: list[float]

    def equals(self, other: Outcome) -> bool:
        checked = [event["cause"] for event in self.events if event["kind"] == "ledger_checked"]
        same = (self.rows, self.digests) == (other.rows, other.digests)
        return self.status == other.status == 0 and same and bool(checked) and not any(checked)


class Site:
    """Runs of one tiny configuration, each in a folder of its own.

    Args:
        data: folder with the tiny preset.
        runs: where they are put.
    """

    def __init__(self, data: Path, runs: Path, *settings: str) -> None:
        self._data, self.runs, self._settings = data, runs, settings

    def begin(
        self,
        name: str,
        *more: str,
        faults: Sequence[Fault] = (),
        before: Sequence[str] = (),
        output: Path | None = None,
        environment: Mapping[str, str] | None = None,
        module: str = "tests.faulty_run",
    ) -> Command:
        """Start a run.

        Args:
            output: file of what it says; in its folder where left out.
            before: what the command line begins with, such as `ip netns exec NAME`.
            environment: variables beside this process's own.
            module: what is run in place of `rlhf_ray`.
        """
        arguments = (
            *PPO,
            f"paths.data={self._data}",
            f"paths.runs={self.runs / name}",
            f"cluster.silent_after_s={SILENT_S}",
            "tracking.progress=lines",
            *self._settings,
            *more,
        )
        program = [*before, sys.executable, "-m", module, *arguments]
        listed = json.dumps([asdict(fault) for fault in faults])
        variables = {**user_environment(), "FAULTS": listed, **(environment or {})}
        return start_program(program, output or self.runs / name / "output", variables, REPOSITORY)

    def fault(self, name: str, role: str, how: str, when: str, call: int) -> Fault:
        folder = self.runs / name
        folder.mkdir(parents=True, exist_ok=True)
        return Fault(role, how, when, call, str(folder / f"mark-{role}-{call}"))

    def folder(self, name: str) -> Path:
        return self.runs / name / "tiny-ppo"

    def run(
        self,
        name: str,
        *more: str,
        faults: Sequence[Fault] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        command = self.begin(name, *more, faults=faults, environment=environment)
        command.wait(DEADLINE_S)
        return self.outcome(name, command)

    def outcome(self, name: str, command: Command) -> Outcome:
        folder = self.folder(name)
        kept = (folder / "policy/model.safetensors", folder / "samples.jsonl", folder / "ledger.jsonl")
        files = [path for path in kept if path.exists()]
        return Outcome(
            command.process.returncode,
            command.stderr.strip().splitlines()[-1] if command.stderr.strip() else "",
            [without_times(row) for row in rows_of(folder / "metrics.jsonl")],
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            rows_of(folder / "events.jsonl"),
            [row["wall_s"] for row in rows_of(folder / "metrics.jsonl")],
        )

    def forget(self, name: str) -> None:
        shutil.rmtree(self.runs / name, ignore_errors=True)
