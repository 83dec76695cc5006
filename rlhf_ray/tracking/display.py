"""What a run shows while it goes on: a live panel on a terminal, one aligned line a step elsewhere, or nothing.

A display knows nothing of PPO. The command says which metrics are columns; each column says how it is written
and whether its course over the run is worth a curve.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.style import Style
from rich.table import Table
from rich.text import Text

from rlhf_ray.tracking.metrics import PHASE_COLORS, phase_times

Metrics = Mapping[str, float | int | None]
Mode = Literal["auto", "live", "lines", "off"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_TREND_WINDOW = 5
_HEADER_EVERY = 20


@dataclass(frozen=True)
class Column:
    """One metric as a reader sees it.

    Attributes:
        metric: its name in the registry.
        heading: what stands above it.
        format: format specification, `+.3f`.
        curve: draw its course over the run.
        better: which way is good; colours the arrow.
    """

    metric: str
    heading: str
    format: str
    curve: bool = False
    better: Literal["higher", "lower"] | None = None

    def text(self, metrics: Metrics) -> str:
        """The value as written, or a dash where there is none."""
        value = _finite(metrics.get(self.metric))
        return "—" if value is None else format(value, self.format)


class Display:
    """The display of one run. This one shows nothing; the others override what they show.

    Use as a context manager.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def phase(self, text: str) -> None:
        """Say what is happening now: `starting generator ×2 …`, `sampling`."""

    def step(self, metrics: Metrics) -> None:
        """Show a finished step; `metrics["step"]` says which, from 1."""

    def message(self, text: str) -> None:
        """Say something that stays on the screen."""


def open_display(
    mode: Mode, title: str, total_steps: int, columns: Sequence[Column], console: Console | None = None
) -> Display:
    """The display that the settings ask for.

    Args:
        mode: `auto` is `live` on a terminal and `lines` elsewhere.
        title: run name and model.
        total_steps: steps of the whole run, those before a resume included.
        columns: metrics to show, most important first.
        console: where to write; the standard output by default.
    """
    console = console or Console(highlight=False)
    if mode == "auto":
        mode = "live" if console.is_terminal and not console.is_dumb_terminal else "lines"
    if mode == "live":
        return LiveDisplay(console, title, total_steps, columns)
    if mode == "lines":
        return LineDisplay(console, title, total_steps, columns)
    return Display()


class LineDisplay(Display):
    """One aligned line a step, the header again every 20; each phase is mentioned the first time only."""

    def __init__(self, console: Console, title: str, total_steps: int, columns: Sequence[Column]) -> None:
        self._console, self._title, self._total, self._columns = console, title, total_steps, columns
        self._widths = [max(len(column.heading), 8) for column in columns]
        self._label_width = max(len("step"), 2 * len(str(total_steps)) + 1)
        self._num_lines = 0
        self._seen_phases: set[str] = set()

    def __enter__(self) -> Self:
        self._print(self._title, "bold")
        return self

    def phase(self, text: str) -> None:
        if text not in self._seen_phases:
            self._seen_phases.add(text)
            self._print(f"· {text}", "dim")

    def step(self, metrics: Metrics) -> None:
        if self._num_lines % _HEADER_EVERY == 0:
            self._print(self._row("step", [column.heading for column in self._columns]), "bold")
        self._num_lines += 1
        label = f"{_step_number(metrics)}/{self._total}"
        self._print(self._row(label, [column.text(metrics) for column in self._columns]))

    def message(self, text: str) -> None:
        self._print(text)

    def _row(self, label: str, cells: Sequence[str]) -> str:
        row = label.rjust(self._label_width)
        for cell, width in zip(cells, self._widths, strict=True):
            # A log file is as wide as it likes; a terminal shows the columns that fit.
            if self._console.is_terminal and len(row) + 2 + width > self._console.width:
                break
            row += "  " + cell.rjust(width)
        return row

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(text, style=style or ""), soft_wrap=True)


class LiveDisplay(Display):
    """A panel that is redrawn in place: progress, curves, the last step's numbers, where the time goes."""

    def __init__(self, console: Console, title: str, total_steps: int, columns: Sequence[Column]) -> None:
        self._title, self._total, self._columns = title, total_steps, columns
        self._history: dict[str, list[float]] = {column.metric: [] for column in columns}
        self._last: Metrics = {}
        self._phase_seconds: deque[dict[str, float]] = deque(maxlen=10)
        self._step_seconds: deque[float] = deque(maxlen=10)
        self._done = 0
        self._started = self._phase_started = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._phase = "starting …"
        self._ended = False
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        self._phase = "stopped" if kind else "done"
        self._live.stop()

    def phase(self, text: str) -> None:
        self._phase, self._phase_started = text, time.monotonic()

    def step(self, metrics: Metrics) -> None:
        self._done, self._last = _step_number(metrics), dict(metrics)
        for column in self._columns:
            value = _finite(metrics.get(column.metric))
            if value is not None:
                self._history[column.metric].append(value)
        self._phase_seconds.append(phase_times(metrics))
        seconds = _finite(metrics.get("time/step_s"))
        if seconds is not None:
            self._step_seconds.append(seconds)
        self._live.refresh()

    def message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self._last:
            parts += [Text(), self._curves(), Text(), _Tiles([c for c in self._columns if not c.curve], self._last)]
        totals = _sum_phases(self._phase_seconds)
        if totals:
            parts += [Text(), _ShareBar(totals)]
        return Panel(
            Group(*parts),
            title=Text(f" {self._title} ", style="bold"),
            title_align="left",
            border_style="cyan",
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        elapsed = _clock(time.monotonic() - self._started)
        left = f"{elapsed} · {self._remaining()}" if not self._ended else elapsed
        # A pulse until the first step: starting engines takes its time and has no percentage.
        bar = ProgressBar(
            total=self._total,
            completed=self._done,
            pulse=self._done == 0 and not self._ended,
            style="grey37",
            complete_style="cyan",
            finished_style="green",
        )
        grid.add_row(Text(f"step {self._done}/{self._total}", style="bold"), bar, Text(left, style="dim"))
        if self._ended:
            return Group(grid, Text(self._phase, style="green" if self._phase == "done" else "red"))
        since = time.monotonic() - self._phase_started
        waited = f"  {since:.0f} s" if since >= 2 else ""
        self._spinner.update(text=Text.assemble((self._phase, "cyan"), (waited, "dim")))
        return Group(grid, self._spinner)

    def _remaining(self) -> str:
        if not self._step_seconds:
            return "-:-- left"
        mean = sum(self._step_seconds) / len(self._step_seconds)
        return f"{_clock(mean * max(0, self._total - self._done))} left"

    def _curves(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, justify="right", min_width=8)
        grid.add_column(no_wrap=True, width=1)
        grid.add_column(ratio=1)
        for column in self._columns:
            if column.curve:
                history = self._history[column.metric]
                grid.add_row(
                    Text(column.heading, style="dim"),
                    Text(column.text(self._last), style="bold"),
                    _arrow(history, column.better),
                    _Sparkline(history),
                )
        return grid


class _Sparkline:
    """A curve as wide as there is room; a run longer than that is averaged into as many buckets."""

    def __init__(self, history: Sequence[float]) -> None:
        self._history = history

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._history, options.max_width), style="cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


class _Tiles:
    """Heading above value, as many beside each other as fit, the same number in each row."""

    def __init__(self, columns: Sequence[Column], metrics: Metrics) -> None:
        self._tiles = [(column.heading, column.text(metrics)) for column in columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._tiles:
            return
        widest = max(max(len(heading), len(value)) for heading, value in self._tiles)
        fit = max(1, min(len(self._tiles), options.max_width // (widest + 2)))
        per_row = math.ceil(len(self._tiles) / math.ceil(len(self._tiles) / fit))
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in range(per_row):
            grid.add_column(ratio=1, no_wrap=True)
        for start in range(0, len(self._tiles), per_row):
            row = self._tiles[start : start + per_row]
            grid.add_row(*(Text(heading, style="dim") for heading, _ in row))
            grid.add_row(*(Text(value, style="bold") for _, value in row))
        yield grid


class _ShareBar:
    """A full-width bar cut by share of time, with its legend below."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(self._seconds.values())
        position, start = 0.0, 0
        for name, seconds in self._seconds.items():
            position += seconds / total * options.max_width
            end = round(position)
            yield Segment("█" * (end - start), Style(color=PHASE_COLORS[name]))
            start = end
        yield Segment.line()
        legend = Text()
        for name, seconds in sorted(self._seconds.items(), key=lambda item: -item[1]):
            share = 100 * seconds / total
            entry = Text.assemble(("■ ", PHASE_COLORS[name]), (f"{name} {share:.0f} %", "dim"))
            separator = 3 if legend else 0
            if share < 1 or legend.cell_len + separator + entry.cell_len > options.max_width:
                break
            legend.append(" " * separator)
            legend.append_text(entry)
        yield legend


def sparkline(history: Sequence[float], width: int) -> str:
    """The course of a number in one line of block characters.

    Args:
        history: its values, oldest first.
        width: most characters.
    """
    if not history or width < 1:
        return ""
    buckets = min(width, len(history))
    edges = [round(index * len(history) / buckets) for index in range(buckets + 1)]
    means = [sum(history[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * buckets
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def _arrow(history: Sequence[float], better: Literal["higher", "lower"] | None) -> Text:
    """Where the last value lies against the mean of the few before it."""
    before = history[-1 - _TREND_WINDOW : -1]
    if not before:
        return Text(" ")
    change = history[-1] - sum(before) / len(before)
    spread = max(history) - min(history)
    if abs(change) <= 0.02 * spread:
        return Text("→", style="dim")
    rises = change > 0
    style = "dim" if better is None else ("green" if rises == (better == "higher") else "yellow")
    return Text("↑" if rises else "↓", style=style)


def _sum_phases(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    totals = {name: sum(step.get(name, 0.0) for step in steps) for name in PHASE_COLORS}
    return {name: seconds for name, seconds in totals.items() if seconds > 0}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _step_number(metrics: Metrics) -> int:
    return int(metrics["step"] or 0)


def _finite(value: float | int | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
