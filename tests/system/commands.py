"""The project's commands as a user starts them: processes of their own, each with a deadline."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
PPO = ("ppo", "configs/tiny/ppo.yaml")
_TICK_S = 0.05
# What the test process sets to keep itself quiet; a user's shell has none of it.
_NOT_HANDED_ON = (
    "RAY_ADDRESS",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_NO_USAGE_STATS",
    "TOKENIZERS_PARALLELISM",
)


def user_environment() -> dict[str, str]:
    """The environment of a command: this one without what only tests set. Byte code is kept, for quick imports."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "200"}


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """The first true value of a condition, asked every tick.

    Raises:
        TimeoutError: it stayed false.
    """
    deadline = time.monotonic() + deadline_s
    tick = Event()
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        tick.wait(_TICK_S)
    raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")


@dataclass
class Command:
    """A command that was started.

    Attributes:
        process: it.
        output: file with its stdout; `.err` beside it has its stderr.
        started: when, on the monotonic clock.
        descendants: every process that was seen below it.
        names: theirs.
        seconds: how long it ran.
    """

    process: subprocess.Popen[bytes]
    output: Path
    started: float = field(default_factory=time.monotonic)
    descendants: set[psutil.Process] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def stdout(self) -> str:
        return self.output.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.output.with_suffix(".err").read_text(encoding="utf-8")

    def wait(self, deadline_s: float) -> int:
        """The exit status; its processes are watched while it runs.

        Raises:
            TimeoutError: it was still running, and is ended with all that it started.
        """

        def ended() -> bool:
            self._watch()
            return self.process.poll() is not None

        try:
            wait_until(ended, deadline_s, f"the end of {self.process.args!r}")
        except TimeoutError:
            self.process.kill()
            for process in self.descendants:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            raise
        finally:
            self.seconds = time.monotonic() - self.started
        return int(self.process.returncode)

    def left_running(self, grace_s: float = 15.0) -> list[str]:
        """Names of the descendants that outlive it."""
        _, alive = psutil.wait_procs(list(self.descendants), timeout=grace_s)
        return [process.name() for process in alive]

    def _watch(self) -> None:
        try:
            new = set(psutil.Process(self.process.pid).children(recursive=True)) - self.descendants
            self.descendants |= new
            self.names |= {process.name() for process in new}
        except psutil.NoSuchProcess:
            return  # ended while it was looked at


def start(arguments: Sequence[str], output: Path, module: str = "rlhf_ray", **environment: str) -> Command:
    """Begin `python -m <module> <arguments>` in the repository's root."""
    return start_program(
        [sys.executable, "-m", module, *arguments], output, {**user_environment(), **environment}, REPOSITORY
    )


def start_program(program: Sequence[str], output: Path, environment: dict[str, str], folder: Path) -> Command:
    """Begin any program, in a session of its own."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as out, output.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            list(program), cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
    return Command(process, output)


def run(arguments: Sequence[str], output: Path, deadline_s: float, **environment: str) -> Command:
    """Run a command to its end."""
    command = start(arguments, output, **environment)
    command.wait(deadline_s)
    return command


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file, none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """What a second run with the same seed must repeat."""
    return {
        name: value
        for name, value in row.items()
        if name != "wall_s"
        and not name.startswith(("time/", "throughput/", "utilization/", "recovery/"))
        and not name.endswith("/time_s")
    }
