"""What is left to look at when a run is over: its curves, and samples before and after side by side.

The page is one file with no outside hosts: it can be mailed, archived and opened without a network.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from rlhf_ray.tracking.logs import Row, read_log
from rlhf_ray.tracking.metrics import PHASE_COLORS, phase_times
from rlhf_ray.tracking.run_folder import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3b6ea5", "#d9730d", "#8a8a8a"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#bbbbbb",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": "#555555",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": "#222222",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.xmargin": 0.01,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.color": "#555555",
    "xtick.labelsize": 9,
    "ytick.color": "#555555",
    "ytick.labelsize": 9,
}


@dataclass(frozen=True)
class SamplePair:
    """The responses of the policy before and after training to one prompt.

    Attributes:
        prompt: as text.
        before: response before training.
        after: response after training.
        reward_before: score of the reward model; `None` where it could not score.
        reward_after: the same after training.
        judge_before: verdict of the independent judge; `None` without one.
        judge_after: the same after training.
    """

    prompt: str
    before: str
    after: str
    reward_before: float | None
    reward_after: float | None
    judge_before: float | None = None
    judge_after: float | None = None


def plot_ppo(metrics_path: Path, png_path: Path, title: str) -> None:
    """Four panels: reward, KL and its coefficient, response length and entropy, time by phase.

    Args:
        metrics_path: the run's `metrics.jsonl`.
        png_path: the picture to write.
        title: above it.
    """
    rows = read_log(metrics_path)
    steps = _values(rows, "step")
    mean, std = _values(rows, "reward/mean"), _values(rows, "reward/std")
    phases = [phase_times(row) for row in rows]  # type: ignore[arg-type]
    present = [name for name in PHASE_COLORS if any(phase.get(name) for phase in phases)]
    with _figure(png_path, 2, 2, title) as (reward, kl, response, seconds):
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        reward.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0)
        reward.plot(steps, mean, color=BLUE)
        reward.set_title("Reward, mean ± standard deviation")
        kl.set_title("KL to the reference, nats a sequence")
        _two_scales(kl, steps, _values(rows, "kl/reference"), _values(rows, "kl/coefficient"), "coefficient β")
        response.set_title("Response length, tokens")
        _two_scales(
            response,
            steps,
            _values(rows, "response/length_mean"),
            _values(rows, "policy/entropy"),
            "entropy, nats a token",
        )
        seconds.set_title("Time of a step, s")
        if present:
            seconds.stackplot(
                steps,
                [[phase.get(name, 0.0) for phase in phases] for name in present],
                labels=present,
                colors=[PHASE_COLORS[name] for name in present],
                linewidth=0,
            )
            seconds.legend(reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1, handleheight=1)
        seconds.set_ylim(bottom=0)


def plot_loss(metrics_path: Path, png_path: Path, title: str) -> None:
    """Two panels of a supervised run: the loss, and accuracy (reward model) or learning rate (SFT).

    Args:
        metrics_path: the run's `metrics.jsonl`.
        png_path: the picture to write.
        title: above it.
    """
    rows = read_log(metrics_path)
    steps = _values(rows, "step")
    with _figure(png_path, 1, 2, title) as (loss, second):
        loss.set_title("Loss")
        _smoothed(loss, steps, _values(rows, "loss"))
        if rows and "accuracy" in rows[0]:
            second.set_title("Accuracy on the step's pairs")
            _smoothed(second, steps, _values(rows, "accuracy"))
            second.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
            second.set_ylim(top=1.02)
        else:
            second.set_title("Learning rate")
            second.plot(steps, _values(rows, "lr"), color=BLUE)
            second.set_ylim(bottom=0)


def write_samples(path: Path, pairs: Sequence[SamplePair]) -> None:
    """`samples.jsonl`: what the page shows, one object a prompt."""
    write_atomic(path, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))


def write_samples_page(
    path: Path, title: str, summary: Mapping[str, Any], pairs: Sequence[SamplePair], plot_png: Path | None
) -> None:
    """`samples.html`: headline figures, the curves, and samples before and after.

    Args:
        path: the page to write.
        title: run name and model.
        summary: the run's `summary.json`; the figures it holds are shown, none is needed.
        pairs: the first of the held-out prompts, in their order; the page says that they were not selected.
        plot_png: the run's curves, embedded.
    """
    plot = base64.b64encode(plot_png.read_bytes()).decode("ascii") if plot_png and plot_png.exists() else None
    rewards = [pair.reward_before for pair in pairs], [pair.reward_after for pair in pairs]
    judged = [pair.judge_before for pair in pairs], [pair.judge_after for pair in pairs]
    reward_scale, judge_scale = _ColorScale.of(*rewards), _ColorScale.of(*judged)
    cards = [
        {
            "prompt": pair.prompt,
            "sides": [
                ("before", pair.before, _chip(pair.reward_before, reward_scale), _chip(pair.judge_before, judge_scale)),
                ("after", pair.after, _chip(pair.reward_after, reward_scale), _chip(pair.judge_after, judge_scale)),
            ],
        }
        for pair in pairs
    ]
    write_atomic(
        path,
        render_page(
            "rlhf_ray.tracking",
            "samples.html.jinja",
            title=title,
            headlines=_headlines(summary),
            plot=plot,
            cards=cards,
        ),
    )


def render_page(package: str, template: str, **values: Any) -> str:
    """A page in the common look: a template that extends `page.html.jinja`.

    Args:
        package: where the template is.
        template: its file.
        values: what it shows; text is escaped, `markupsafe.Markup` is not.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, ".") for name in (package, __package__)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Headline:
    """A figure at the top of a page; `tone` is `good`, `bad` or empty."""

    label: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class _Chip:
    """A score with its colour: `good` or `bad`, and how much of it in per cent."""

    text: str
    tone: str
    strength: int


@dataclass(frozen=True)
class _ColorScale:
    """Scores are coloured by their distance from the mean before training: gains are green, losses red."""

    middle: float
    span: float

    @classmethod
    def of(cls, before: Sequence[float | None], after: Sequence[float | None]) -> _ColorScale:
        base = [score for score in before if score is not None]
        everything = base + [score for score in after if score is not None]
        middle = sum(base) / len(base) if base else 0.0
        return cls(middle, max((abs(score - middle) for score in everything), default=0.0) or 1.0)


def _chip(score: float | None, scale: _ColorScale) -> _Chip | None:
    if score is None:
        return None
    position = (score - scale.middle) / scale.span
    return _Chip(f"{score:+.2f}", "good" if position >= 0 else "bad", round(10 + 45 * abs(position)))


def _headlines(summary: Mapping[str, Any]) -> list[Headline]:
    """The figures of `summary.json` that a reader wants first."""
    result: list[Headline] = []
    held_out: Mapping[str, Any] = summary.get("held_out") or {}
    for label, key in (("Reward", "reward"), ("Judge (VADER)", "vader")):
        before, after = held_out.get(f"{key}_before"), held_out.get(f"{key}_after")
        if before is None or after is None:
            continue
        note = f"{before:+.2f} before, {after:+.2f} after"
        std = held_out.get("reward_std_before") if key == "reward" else None
        if std:
            note += f" ({(after - before) / std:+.2f} std)"
        result.append(Headline(label, f"{after - before:+.2f}", note, "good" if after >= before else "bad"))
    kl = summary.get("kl/reference")
    if kl is not None:
        result.append(Headline("KL to the reference", f"{kl:.1f} nats", "a sequence, at the end"))
    reward_model: Mapping[str, Any] = summary.get("reward_model") or {}
    if reward_model.get("accuracy") is not None:
        note = f"on {reward_model['pairs']:,} held-out pairs" if reward_model.get("pairs") else "on held-out pairs"
        result.append(Headline("Reward model accuracy", f"{reward_model['accuracy']:.1%}", note))
    if summary.get("wall_s") is not None:
        minutes, seconds = divmod(round(summary["wall_s"]), 60)
        note = f"{held_out['prompts']:,} held-out prompts judged" if held_out.get("prompts") else "from start to end"
        result.append(Headline("Time", f"{minutes}:{seconds:02d} min", note))
    return result


@contextmanager
def _figure(path: Path, num_rows: int, num_columns: int, title: str) -> Iterator[list[Axes]]:
    """Panels to draw into, in one style, written to `path` at the end."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        # A figure of its own, not pyplot's: no global state, no window system.
        figure = Figure(figsize=(11, 3.1 * num_rows + 0.5), dpi=130, layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        axes: list[Axes] = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        yield axes
        for panel in axes:
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def _two_scales(panel: Axes, steps: Sequence[float], left: Sequence[float], right: Sequence[float], label: str) -> None:
    """One curve on the panel's scale and a dashed one on a scale to the right, both from 0."""
    panel.plot(steps, left, color=BLUE)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    other = panel.twinx()
    other.plot(steps, right, color=ORANGE, linewidth=1.3, linestyle="--")
    other.set_ylabel(label, color=ORANGE)
    other.tick_params(colors=ORANGE, length=0)
    other.grid(False)
    other.set_ylim(bottom=0)


def _smoothed(panel: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    """The values, pale, under their mean over the tenth of the run around each step."""
    reach = max(1, len(values) // 20)
    windows = ([v for v in values[max(0, i - reach) : i + reach + 1] if not math.isnan(v)] for i in range(len(values)))
    panel.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
    panel.plot(steps, [sum(window) / len(window) if window else math.nan for window in windows], color=BLUE)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    """One metric over the rows; NaN, a gap in the curve, where it is missing."""
    found = (row.get(name) for row in rows)
    return [math.nan if value is None else float(value) for value in found]
