"""A run's story on the terminal, and as a page that can be mailed: `report.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf_ray.tracking.display import sparkline
from rlhf_ray.tracking.report import Headline, render_page
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic
from rlhf_ray.tracking.story import Figure, Happening, Story, read_story

_STYLES = {"good": "green", "bad": "red", "warn": "yellow", "": "default"}
_CURVE = (160, 32)
"""Width and height of a curve on the page."""
_CURVE_POINTS = 160


def report_run(path: Path, console: Console | None = None) -> Path:
    """Everything `rlhf-ray report` does.

    Args:
        path: the run's folder.

    Returns:
        The page.

    Raises:
        BadInput: the folder holds no run.
    """
    folder = RunFolder(path)
    story = read_story(folder)
    write_page(story, folder.report_page)
    console = console or Console(highlight=False)
    print_story(story, console)
    console.print(Text(f"the same as a page: {folder.report_page}", style="dim"), soft_wrap=True)
    return folder.report_page


def print_story(story: Story, console: Console) -> None:
    """The verdict, the figures, what happened, and what is proven of the samples."""
    style = _STYLES[story.tone]
    head = Text(story.verdict[:1].upper() + story.verdict[1:], style=f"bold {style}")
    facts = " · ".join(f"{each.label.lower()} {each.value}" for each in _headlines(story))
    title = Text(f" {story.command} {story.name} · started {story.started:%Y-%m-%d %H:%M} UTC ")
    console.print(Panel(Text.assemble(head, "\n", (facts, "dim")), title=title, title_align="left", border_style=style))
    if story.figures:
        console.print(_figures_table(story.figures))
    console.print(_happenings_table(story.happenings))
    for line in (_ledger_line(story), _counts_line(story)):
        if line:
            console.print(Text(line))


def write_page(story: Story, path: Path) -> None:
    """`report.html`: one file, without any other host."""
    write_atomic(
        path,
        render_page(
            "rlhf_ray.tracking",
            "story.html.jinja",
            title=f"{story.command} {story.name}",
            headlines=_headlines(story),
            story=story,
            figures=[(each, *_written(each), _points(each.course)) for each in story.figures],
            happenings=[(each, duration(each.at_s), _took(each)) for each in story.happenings],
            curve=_CURVE,
            ledger=_ledger_line(story),
            counts=_counts_line(story),
        ),
    )


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07 min`, `1:02:03 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _headlines(story: Story) -> list[Headline]:
    lost, ledger = story.lost_roles, story.ledger
    headlines = [
        Headline("Steps", f"{story.steps:,}", f"in {story.starts} start{'s' if story.starts != 1 else ''}"),
        Headline("Time", duration(story.elapsed_s), "first start to last event"),
        Headline("Roles lost", str(len(lost)), f"{duration(story.recovering_s)} to recover" if lost else "none"),
    ]
    if ledger is not None:
        tone = "bad" if ledger.problems else "good"
        wrong = ledger.missing + ledger.repeated + ledger.misplaced
        note = f"{wrong:,} not exactly once" if ledger.problems else "each exactly once"
        headlines.append(Headline("Samples", f"{ledger.trained + ledger.set_aside:,}", note, tone))
    return headlines


def _figures_table(figures: Sequence[Figure]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim", pad_edge=False)
    for heading in ("", "first", "last", "best", "course"):
        table.add_column(heading, justify="right" if heading in ("first", "last") else "left", no_wrap=True)
    for figure in figures:
        table.add_row(figure.name, *_written(figure), Text(sparkline(figure.course, 24), style="cyan"))
    return table


def _happenings_table(happenings: Sequence[Happening]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim", pad_edge=False)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("who", overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    table.add_column("took", justify="right", no_wrap=True)
    for each in happenings:
        what = f"{each.what} → {each.outcome}" if each.outcome else each.what
        # As text: brackets in a cause are no markup.
        words = Text(what, style=_STYLES[each.tone]), Text(each.who), Text(each.why)
        table.add_row(duration(each.at_s), *words, _took(each))
    return table


def _ledger_line(story: Story) -> str:
    ledger = story.ledger
    if ledger is None:
        return ""
    total = f"{ledger.trained:,} samples trained and {ledger.set_aside:,} set aside in {ledger.steps:,} steps"
    return f"Ledger: {total}; " + ("; ".join(ledger.problems) or "none missing, none used twice")


def _counts_line(story: Story) -> str:
    counted = ", ".join(f"{kind.replace('_', ' ')} {count}×" for kind, count in story.counts.items())
    return f"Also: {counted}" if counted else ""


def _written(figure: Figure) -> tuple[str, str, str]:
    best = "" if figure.best is None else f"{_number(figure.best[0])} at step {figure.best[1]}"
    return _number(figure.first), _number(figure.last), best


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _took(happening: Happening) -> str:
    return "" if happening.took_s is None else duration(happening.took_s)


def _points(course: Sequence[float]) -> str:
    """A curve's points for SVG; one of more steps than there is room for is thinned out."""
    width, height = _CURVE
    shown = course[:: max(len(course) // _CURVE_POINTS, 1)]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    across = width / max(len(shown) - 1, 1)
    return " ".join(
        f"{place * across:.1f},{height - 2 - (value - low) / span * (height - 4):.1f}"
        for place, value in enumerate(shown)
    )
