"""What a benchmark measured: one JSON file and one table, of this run and this machine."""

from __future__ import annotations

import json
import math
import numbers
import operator
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.tracking.run_folder import write_atomic

FOLDER = Path(__file__).parent / "results"
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        name: what was measured, unique in its benchmark.
        value: finite.
        unit: empty for a plain ratio or count.
        target: a comparison with the value, in its unit, such as `>= 1.5` or `<= 600 s`; None: only reported.
    """

    name: str
    value: float
    unit: str = ""
    target: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}: nothing was measured")
        # NumPy's numbers too, which JSON does not know.
        plain = int(self.value) if isinstance(self.value, numbers.Integral) else float(self.value)
        object.__setattr__(self, "value", plain)
        if self.target is not None:
            _parse(self.target, self.unit)

    @property
    def holds(self) -> bool | None:
        """Whether the value meets its target; None without one."""
        if self.target is None:
            return None
        compare, bound = _parse(self.target, self.unit)
        return bool(_COMPARE[compare](self.value, bound))


@dataclass(frozen=True)
class Machine:
    """What the numbers depend on, and nothing that names the machine.

    Attributes:
        cores: this process may use.
        memory_gib: in all.
    """

    cpu: str
    cores: int
    memory_gib: float
    python: str
    torch: str


def this_machine() -> Machine:
    from importlib.metadata import version

    facts = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return Machine(
        cpu=model.group(1).strip() if model else platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        python=platform.python_version(),
        torch=version("torch"),
    )


class Report:
    """The results of one benchmark, kept as they come: what was measured outlives a part that fails.

    Args:
        name: of the benchmark; its file is `<folder>/<name>.json`. The first results replace those of another run.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self._name, self.path = name, folder / f"{name}.json"
        self._results: list[Result] = []
        self._machine = this_machine()

    def add(self, results: Sequence[Result], part: str | None = None) -> None:
        """Write the file with these results too, whole or not at all, and print them as a table.

        Args:
            part: heading of the table; the benchmark's name when left out.

        Raises:
            ValueError: two results have one name.
        """
        together = [*self._results, *results]
        names = [result.name for result in together]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"measured twice: {', '.join(sorted(twice))}")
        self._results = together
        rows = [asdict(result) | {"holds": result.holds, "machine": asdict(self._machine)} for result in together]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        _print(f"{self._name}: {part}" if part else self._name, results, self._machine)


def publish(name: str, results: Sequence[Result], folder: Path = FOLDER) -> Path:
    """A benchmark's results at once; see `Report`.

    Returns:
        The file.
    """
    report = Report(name, folder)
    report.add(results)
    return report.path


def _print(name: str, results: Sequence[Result], machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, torch {machine.torch}"
    table = Table(title=name, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("measured", "value", "unit", "target", "holds"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for result in results:
        holds = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[result.holds]
        table.add_row(result.name, f"{result.value:.4g}", result.unit, result.target or "", holds)
    Console().print(table)


def _parse(target: str, unit: str) -> tuple[str, float]:
    match = re.fullmatch(r"(>=|<=|>|<) (-?[\d.]+(?:e-?\d+)?)(?: (.+))?", target)
    if match is None or match.group(3) not in (None, unit):
        raise ValueError(f"target '{target}' is not a comparison such as '>= 1.5' in the result's unit, '{unit}'")
    return match.group(1), float(match.group(2))
