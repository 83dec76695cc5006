import io
import math
from contextlib import nullcontext

import pytest
from rich.console import Console

from rlhf_ray.tracking.display import Column, Display, LineDisplay, LiveDisplay, open_display, sparkline

COLUMNS = [
    Column("reward/mean", "reward", "+.3f", curve=True, better="higher"),
    Column("kl/reference", "KL", ".2f", curve=True),
    Column("value/explained_variance", "expl. var.", "+.2f"),
    Column("time/step_s", "s/step", ".1f"),
]


def console(width=80, terminal=False):
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        highlight=False,
        color_system=None,
        force_interactive=terminal,
        legacy_windows=False,
    )


def metrics(step):
    return {
        "step": step,
        "reward/mean": 0.1 * step,
        "kl/reference": 0.5,
        "time/step_s": 2.0,
        "time/generate_s": 1.0,
        "time/train_s": 0.5,
    }


def written(screen):
    return screen.file.getvalue()


@pytest.mark.parametrize(
    ("mode", "terminal", "kind"),
    [
        ("auto", True, LiveDisplay),
        ("auto", False, LineDisplay),
        ("live", False, LiveDisplay),
        ("lines", True, LineDisplay),
        ("off", True, Display),
    ],
)
def test_the_mode_decides_and_auto_looks_at_the_terminal(mode, terminal, kind, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(open_display(mode, "x", 3, COLUMNS, console(terminal=terminal))) is kind


def test_off_writes_nothing():
    screen = console()
    with open_display("off", "x", 3, COLUMNS, screen) as display:
        display.phase("sampling")
        display.step(metrics(1))
        display.message("m")
    assert written(screen) == ""


def test_lines_are_aligned_with_a_header_every_20():
    screen = console()
    with open_display("lines", "demo", 45, COLUMNS, screen) as display:
        for step in range(1, 46):
            display.step(metrics(step))
    lines = written(screen).splitlines()
    assert lines[0] == "demo"
    headers = [index for index, line in enumerate(lines) if "reward" in line]
    assert headers == [1, 22, 43]
    assert lines[2].split() == ["1/45", "+0.100", "0.50", "—", "2.0"]
    assert {len(line) for line in lines[1:]} == {len(lines[1])}


def test_lines_mention_a_phase_once_and_keep_messages():
    screen = console()
    with open_display("lines", "demo", 2, COLUMNS, screen) as display:
        for step in (1, 2):
            display.phase("sampling")
            display.step(metrics(step))
        display.message("[saved] " + "long " * 40)
    assert written(screen).count("sampling") == 1
    assert "[saved] " + "long " * 40 in written(screen)


def test_a_narrow_terminal_gets_the_first_columns_a_log_file_all():
    for terminal, expected in (
        (True, ["step", "reward"]),
        (False, ["step", "reward", "KL", "expl.", "var.", "s/step"]),
    ):
        screen = console(width=20, terminal=terminal)
        with open_display("lines", "demo", 2, COLUMNS, screen) as display:
            display.step(metrics(1))
        assert written(screen).splitlines()[1].split() == expected


def live_screen(width, steps, total=40):
    screen = console(width=width)
    with open_display("live", "demo · SmolLM2", total, COLUMNS, screen) as display:
        assert isinstance(display, LiveDisplay)
        for step in range(1, steps + 1):
            display.step(metrics(step))
        display.phase("training")
        with screen.capture() as capture:
            screen.print(display._render())
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_fills_the_width_and_holds_what_matters(width):
    screen = live_screen(width, steps=10)
    assert {len(line) for line in screen.splitlines()} == {width}
    for text in (
        "demo · SmolLM2",
        "step 10/40",
        "training",
        "+1.000 ↑",
        "0.50 →",
        "▁",
        "█",
        "1:00 left",
        "expl. var.",
        "—",
        "generate 50 %",
        "train 25 %",
        "other 25 %",
    ):
        assert text in screen, text


def test_a_resumed_run_starts_where_it_stopped():
    screen = console()
    with LiveDisplay(screen, "x", 40, COLUMNS) as display:
        display.step(metrics(31))
        with screen.capture() as capture:
            screen.print(display._render())
    assert "step 31/40" in capture.get()
    assert "0:18 left" in capture.get()


@pytest.mark.parametrize(("error", "ending"), [(None, "done"), (ValueError("x"), "stopped")])
def test_the_last_panel_stays_and_says_how_it_ended(error, ending):
    screen = console(terminal=True)
    with (
        nullcontext() if error is None else pytest.raises(ValueError, match="x"),
        open_display("live", "x", 2, COLUMNS, screen) as display,
    ):
        display.step(metrics(1))
        if error:
            raise error
    assert ending in "".join(written(screen).splitlines()[-15:])


def test_numbers_that_are_not_finite_are_shown_as_a_dash():
    assert Column("x", "x", ".1f").text({"x": math.nan}) == "—"
    assert Column("x", "x", ".1f").text({"x": None}) == "—"
    with open_display("live", "x", 2, COLUMNS, console()) as display:
        display.step({"step": 1, "reward/mean": math.nan})


def test_sparkline_spans_low_to_high_and_averages_what_does_not_fit():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, 0, 0], 3) == "▁█▁"
    assert sparkline([3, 3], 5) == "▁▁"
    assert sparkline([], 5) == ""
    assert len(sparkline(list(range(1000)), 37)) == 37
