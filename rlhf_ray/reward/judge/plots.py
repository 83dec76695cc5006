"""Plots of an evaluation as SVG to be put into a page: text stays text, and colours follow the reader's scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from rlhf_ray.reward.judge.best_of_n import BestOfNPoint
from rlhf_ray.reward.judge.calibration import Calibration
from rlhf_ray.reward.judge.disagreement import DisagreementReport
from rlhf_ray.reward.judge.evaluation import Histogram
from rlhf_ray.reward.judge.groups import Proportion
from rlhf_ray.tracking.report import BLUE, GREY, ORANGE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlhf_ray.reward.judge.policy_samples import BestOfNReport

_WIDTH = 4.9
_LABEL = "#555555"
# Colours of the shared style by the page's names for them.
_VARIABLES = {
    BLUE: "--blue",
    ORANGE: "--orange",
    GREY: "--grey",
    _LABEL: "--dim",
    "#222222": "--ink",
    "#bbbbbb": "--line",
    "#e6e6e6": "--line",
}
_STYLE = STYLE | {"svg.fonttype": "none", "svg.hashsalt": "evaluation", "text.color": _LABEL, "axes.labelpad": 5.0}


@dataclass(frozen=True)
class LabelledEstimate:
    """A labelled value with its interval; None where there is none.

    Attributes:
        count: what it is an estimate from.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, name: str, share: Proportion) -> LabelledEstimate:
        return cls(name, share.value, share.low, share.high, share.count)


@dataclass(frozen=True)
class Reference:
    """A vertical line to compare with."""

    value: float
    label: str
    style: Literal["dotted", "dashed", "solid"]


def intervals(
    estimates: Sequence[LabelledEstimate],
    references: Sequence[Reference],
    label: str,
    limits: tuple[float, float],
    *,
    form: str = ".3f",
    unit: str = "pairs",
) -> Markup:
    """A row each: name, dot and interval, and in figures on the right.

    Args:
        references: drawn behind the dots and named above them.
        limits: of the axis; widened where an interval reaches further.
        form: of the figures.
        unit: what they are estimates from.
    """
    shown = [each for each in estimates if each.value is not None]
    values = [each.value for each in shown if each.value is not None]
    with _svg(0.3 * len(shown) + 0.85, label) as (figure, markup):
        panel = figure.subplots()
        places = list(range(len(shown)))[::-1]
        for place, each in zip(places, shown, strict=True):
            if each.low is not None and each.high is not None:
                panel.plot([each.low, each.high], [place, place], color=BLUE, linewidth=2, clip_on=False)
        panel.plot(values, places, "o", color=BLUE, markersize=6, clip_on=False)
        for reference in references:
            panel.axvline(reference.value, color=GREY, linewidth=1, linestyle=reference.style, zorder=0)
        ends = [end for each in shown for end in (each.value, each.low, each.high) if end is not None]
        panel.set_xlim(min([limits[0], *ends]), max([limits[1], *ends]))
        panel.set_ylim(-0.6, len(shown) - 0.4)
        panel.set_yticks(places, [_short(each.name) for each in shown])
        panel.grid(False)
        right = panel.secondary_yaxis("right")
        right.set_yticks(
            places, [f"{value:{form}} · {each.count:,}" for value, each in zip(values, shown, strict=True)]
        )
        right.tick_params(axis="y", pad=9)
        for axis in (panel, right):
            axis.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        right.spines["right"].set_visible(False)
        panel.set_xlabel(f"{label} (on the right: {label} · {unit})")
        _name_references(panel, references)
    return markup[0]


def reliability(plain: Calibration, scaled: Calibration) -> Markup:
    """Frequency against predicted probability before and after scaling, above the numbers of pairs."""
    with _svg(4.5, "reliability diagram") as (figure, markup):
        panel, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        panel.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="dotted")
        for name, calibration, color, style in (
            ("as it is", plain, ORANGE, "--"),
            ("temperature fitted", scaled, BLUE, "-"),
        ):
            filled = [each for each in calibration.bins if each.count]
            points = [(each.confidence or 0.0, each.frequency or 0.0) for each in filled]
            panel.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.3)
            panel.scatter(
                *zip(*points, strict=True),
                s=[6 + 90 * each.count / calibration.count for each in filled],
                color=color,
                label=name,
                linewidth=0,
                alpha=0.85,
            )
            edges = [calibration.bins[0].low, *(each.high for each in calibration.bins)]
            counts.stairs([each.count for each in calibration.bins], edges, color=color, linestyle=style)
        panel.set_ylabel("share of people who agree")
        panel.set_ylim(-0.02, 1.02)
        legend = panel.legend(loc="upper left", handletextpad=0.3)
        for handle in legend.legend_handles:
            handle.set_sizes([36])
        counts.set_xlim(0.49, 1.01)
        counts.set_ylim(bottom=0)
        counts.set_ylabel("pairs")
        counts.set_xlabel("predicted probability of the response with the higher score")
    return markup[0]


def histogram(counts: Histogram, label: str) -> Markup:
    """Counts with the mean; what lies below 0 in the second colour."""
    with _svg(2.6, label) as (figure, markup):
        panel = figure.subplots()
        width = counts.edges[1] - counts.edges[0]
        middles = [low + width / 2 for low in counts.edges[:-1]]
        colors = [BLUE if middle >= 0 else ORANGE for middle in middles]
        panel.bar(middles, counts.counts, width=0.92 * width, color=colors, linewidth=0)
        panel.axvline(counts.mean, color=GREY, linewidth=1, linestyle="dashed")
        _name_references(panel, [Reference(counts.mean, f"mean {counts.mean:+.2f}", "dashed")])
        panel.set_xlabel(label)
        panel.set_ylim(bottom=0)
    return markup[0]


def disagreement_bands(report: DisagreementReport) -> Markup:
    """Accuracy from the pairs that the members agree on most to those that they agree on least."""
    with _svg(2.9, "accuracy by disagreement") as (figure, markup):
        panel = figure.subplots()
        shown = [band for band in report.bands if band.accuracy.value is not None]
        places = range(1, len(shown) + 1)
        for place, band in zip(places, shown, strict=True):
            if band.accuracy.low is not None and band.accuracy.high is not None:
                panel.plot([place, place], [band.accuracy.low, band.accuracy.high], color=BLUE, linewidth=2)
        values = [band.accuracy.value for band in shown if band.accuracy.value is not None]
        panel.plot(places, values, "o", color=BLUE, markersize=6)
        panel.axhline(0.5, color=GREY, linewidth=1, linestyle="dotted")
        panel.set_xlim(0.5, len(shown) + 0.5)
        panel.set_xticks(list(places), [f"{band.low:.2g}–{band.high:.2g}" for band in shown])
        panel.set_xlabel("standard deviation over the members")
        panel.set_ylabel("accuracy")
    return markup[0]


def risk_coverage(report: DisagreementReport) -> Markup:
    """Error rate among the pairs that the members agree on most, by how many are kept."""
    with _svg(2.9, "errors by coverage") as (figure, markup):
        panel = figure.subplots()
        coverage = [point.coverage for point in report.risk_coverage]
        panel.plot(coverage, [point.risk for point in report.risk_coverage], "o-", color=BLUE, markersize=4)
        panel.axhline(report.errors / report.pairs, color=GREY, linewidth=1, linestyle="dotted")
        panel.set_xlim(0, 1.02)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("share of pairs kept, least disagreement first")
        panel.set_ylabel("error rate")
    return markup[0]


def best_of_n(report: BestOfNReport) -> Markup:
    """What the judge says of the pick, and the reward that it was picked for, over √KL."""
    curve = report.curve
    with _svg(3.7, "best-of-n curve") as (figure, markup):
        panel = figure.subplots()
        reward = panel.twinx()
        distance = [point.sqrt_kl for point in curve.points]
        bounds = [(point.gold_low, point.gold_high) for point in curve.points]
        known = [(low, high) for low, high in bounds if low is not None and high is not None]
        if len(known) == len(bounds):
            low, high = zip(*known, strict=True)
            panel.fill_between(distance, low, high, color=BLUE, alpha=0.15, linewidth=0)
        panel.plot(distance, [point.gold for point in curve.points], "o-", color=BLUE, markersize=4)
        _mark_peak(panel, curve.points, curve.peak_n)
        reward.plot(distance, [point.proxy for point in curve.points], color=ORANGE, linewidth=1.3, linestyle="--")
        reward.set_ylabel("reward", color=ORANGE)
        reward.tick_params(colors=ORANGE, length=0)
        reward.grid(False)
        panel.set_xlabel("√KL to the policy, √nats (above: n)")
        panel.set_ylabel(_short(report.judge), color=BLUE)
        panel.tick_params(axis="y", colors=BLUE, length=0)
        panel.set_xlim(0, distance[-1] * 1.03)
        top = panel.secondary_xaxis("top")
        top.set_xticks(distance, [str(point.n) for point in curve.points])
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
    return markup[0]


def _mark_peak(panel: Axes, points: Sequence[BestOfNPoint], peak_n: int) -> None:
    peak = next(point for point in points if point.n == peak_n)
    panel.axvline(peak.sqrt_kl, color=GREY, linewidth=1, linestyle="dotted", zorder=0)
    panel.plot([peak.sqrt_kl], [peak.gold], "o", color=BLUE, markersize=8)
    left = peak.sqrt_kl > 0.7 * points[-1].sqrt_kl
    panel.annotate(
        f"peak, n = {peak.n}",
        (peak.sqrt_kl, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
    )


def _name_references(panel: Axes, references: Sequence[Reference]) -> None:
    """Above the panel; neighbours that would overlap share a line of text."""
    low, high = panel.get_xlim()
    last_end, last_row = -1.0, 0
    for reference in sorted(references, key=lambda each: each.value):
        at = (reference.value - low) / (high - low)
        half = 0.011 * len(reference.label)
        last_row = 0 if at - half > last_end else (last_row + 1) % 3
        last_end = max(last_end, at + half)
        panel.annotate(
            reference.label,
            (reference.value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 11 * last_row),
            textcoords="offset points",
            ha="center" if half < at < 1 - half else ("left" if at <= half else "right"),
            fontsize=8.5,
        )


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


@contextmanager
def _svg(height: float, description: str) -> Iterator[tuple[Figure, list[Markup]]]:
    """A figure of the page's width to draw into; its picture is in the list at the end."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    markup: list[Markup] = []
    with matplotlib.rc_context(_STYLE):
        # A figure of its own, not pyplot's: no global state, no window system.
        figure = NewFigure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, markup
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    markup.append(_embedded(buffer.getvalue(), description))


def _embedded(svg: str, description: str) -> Markup:
    """An SVG document as an element of a page, in the page's colours and typeface."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Names of groups repeat from figure to figure; nothing refers to them.
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    for color, variable in _VARIABLES.items():
        element = element.replace(color, f"var({variable})")
    element = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", element)
    label = Markup.escape(description)
    return Markup(element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
