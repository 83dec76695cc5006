"""The evaluation of a reward model as one page: the verdict, what to change first, then every figure with its plot.

The page is one file with no outside hosts. What was not looked at has no section on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from rlhf_ray.reward.judge import plots
from rlhf_ray.reward.judge.accuracy import StratumAccuracy
from rlhf_ray.reward.judge.benchmarks.cases import BenchmarkResult
from rlhf_ray.reward.judge.data_report import DataReport, LengthReport, SetReport
from rlhf_ray.reward.judge.evaluation import PairEvaluation
from rlhf_ray.reward.judge.findings import interval_text, percent
from rlhf_ray.reward.judge.gate import CHANCE, Verdict
from rlhf_ray.reward.judge.leakage import Leakage, Matches
from rlhf_ray.reward.judge.plots import LabelledEstimate, Reference
from rlhf_ray.reward.judge.report import EvaluationReport
from rlhf_ray.tracking.report import Headline, render_page
from rlhf_ray.tracking.run_folder import write_atomic


@dataclass(frozen=True)
class Plot:
    """A picture with what it shows and how to read it."""

    title: str
    note: str
    picture: Markup


@dataclass(frozen=True)
class Row:
    """Of a table; a tone (`good`, `bad`, `open`) colours its first cell."""

    cells: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """With a caption, or an empty one; without columns it has no head."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    about: str
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Banner:
    """The verdict in plain words; the tone is `good`, `bad` or `open`."""

    title: str
    text: str
    tone: str


def write_page(path: Path, report: EvaluationReport) -> None:
    """Write the report as a page.

    Args:
        path: the file.
    """
    sections = (
        _accuracy(report.pairs),
        _calibration(report.pairs),
        _scores(report.pairs),
        _length_and_format(report.pairs),
        _disagreement(report.pairs),
        _policy(report),
        _benchmarks(report.benchmarks),
        _integrity(report),
        _data(report),
    )
    page = render_page(
        "rlhf_ray.reward.judge",
        "evaluation.html.jinja",
        title=report.name,
        about=_about(report),
        verdict=_banner(report.verdict),
        headlines=_headlines(report),
        findings=report.findings,
        sections=[section for section in sections if section is not None],
    )
    write_atomic(path, page)


def _about(report: EvaluationReport) -> str:
    pairs = report.pairs
    version = f" (version {report.version})" if report.version else ""
    ties = f", {pairs.ties:,} of them ties" if pairs.ties else ""
    return (
        f"The reward model {report.model}{version}, judged on {pairs.pairs:,} pairs of {pairs.prompts:,} prompts"
        f"{ties}. The run took {report.wall_s:,.0f} s. Intervals are 95 % and allow for prompts and texts that pairs "
        "share."
    )


def _banner(verdict: Verdict | None) -> Banner:
    if verdict is None:
        return Banner("Not judged", "The release gate was not asked; --gate asks it.", "open")
    if verdict.released:
        return Banner("Released", "Every threshold of the gate holds and every integrity check passed.", "good")
    names = ", ".join(dict.fromkeys(line.partition(":")[0] for line in verdict.refusals))
    count = len(verdict.refusals)
    text = (
        f"{'One reason' if count == 1 else f'{count} reasons'} not to train a policy with this reward model: {names}."
    )
    return Banner("Refused", f"{text} What was found, and what to change, comes first below.", "bad")


def _headlines(report: EvaluationReport) -> list[Headline]:
    pairs, ceiling, votes = report.pairs, report.pairs.ceiling.accuracy, report.pairs.vote_accuracy
    accuracy, overpaid = pairs.accuracy, pairs.length.overpayment.share
    grave = {finding.name for finding in report.findings if finding.severity in ("refusal", "high")}

    def tone(name: str) -> str:
        return "bad" if name in grave else ""

    range_text = (
        "no interval"
        if accuracy.low is None or accuracy.high is None
        else f"{100 * accuracy.low:.1f}–{100 * accuracy.high:.1f} %"
    )
    found = [
        Headline(
            "Accuracy",
            "–" if accuracy.value is None else percent(accuracy.value),
            f"{range_text}; "
            + (
                "no raters' ceiling known"
                if ceiling is None or votes is None
                else f"{percent(votes)} of single votes, where the raters' ceiling is {percent(ceiling)}"
            ),
            tone("accuracy"),
        ),
        Headline(
            "Calibration error",
            f"{pairs.scaled.ece:.3f}",
            f"scaled by T = {pairs.temperature.temperature:.2f}; floor {pairs.scaled.floor.mean:.3f}; "
            f"{pairs.calibration.ece:.3f} as it is",
            tone("calibration"),
        ),
    ]
    if overpaid.value is not None:
        found.append(
            Headline(
                "Overpaid for length",
                percent(overpaid.value),
                f"{interval_text(overpaid)} of a typical score difference",
                tone("length"),
            )
        )
    if report.leakage is not None:
        texts = report.leakage.texts
        found.append(
            Headline(
                "Leaked pairs",
                f"{texts.count:,}",
                f"{percent(texts.share)} hold a text from training",
                tone("leakage"),
            )
        )
    if report.best_of_n is not None:
        curve = report.best_of_n.curve
        found.append(
            Headline("Judge peaks at", f"n = {curve.peak_n}", f"of {curve.points[-1].n}; √KL {curve.peak_sqrt_kl:.2f}")
        )
    return found


def _accuracy(pairs: PairEvaluation) -> Section:
    references = [Reference(CHANCE, "chance", "dotted")]
    if pairs.accuracy.value is not None:
        references.append(Reference(pairs.accuracy.value, "all", "solid"))
    shown: list[Plot] = []

    def add(title: str, note: str, strata: Sequence[StratumAccuracy]) -> None:
        estimates = [
            LabelledEstimate.of(each.name, each.accuracy) for each in strata if each.accuracy.value is not None
        ]
        if len(estimates) > 1:
            shown.append(Plot(title, note, plots.intervals(estimates, references, "accuracy", (0.45, 1.0))))

    add("By source", "A source behind the others is where the policy will go wrong.", pairs.by_source)
    add("By gap", "Distance of the mean ratings: the smaller it is, the less sure are people too.", pairs.by_gap)
    attributes = [StratumAccuracy(each.name, each.accuracy) for each in pairs.by_attribute]
    add("By attribute", "Each head against the labels of its own attribute.", attributes)
    about = f"In {interval_text(pairs.accuracy)} of the pairs the preferred response has the higher score."
    if pairs.ceiling.accuracy is not None and pairs.ceiling.agreement is not None and pairs.vote_accuracy is not None:
        about += (
            f" Two raters give the same answer in {percent(pairs.ceiling.agreement)} of the cases, by which no model "
            f"can match more than {percent(pairs.ceiling.accuracy)} of single votes; this one matches "
            f"{percent(pairs.vote_accuracy)}. Accuracy is counted against the majority, which is less "
            "noisy than a vote."
        )
    if pairs.position is not None:
        about += f" The response shown first is the preferred one in {interval_text(pairs.position)}."
    return Section("Accuracy", about, tuple(shown))


def _calibration(pairs: PairEvaluation) -> Section:
    picture = plots.reliability(pairs.calibration, pairs.scaled)
    fit = pairs.temperature
    about = (
        f"σ(score difference) should be the share of people who prefer the response. The fitted temperature is "
        f"{fit.temperature:.3g}"
        + (" (at the bound of the search: no estimate)" if fit.at_bound else "")
        + ". Even a perfect model has an error above 0 on so few pairs; that is the floor."
    )
    note = "On the diagonal the model means what it says; below it, on the right, too sure. Large dots are many pairs."
    both = (pairs.calibration, pairs.scaled)
    rows = [
        ("calibration error", [f"{each.ece:.4f}" for each in both]),
        ("its sampling floor", [f"{each.floor.mean:.4f}" for each in both]),
        ("95 % quantile of the floor", [f"{each.floor.quantile_95:.4f}" for each in both]),
        ("negative log-likelihood, nats", [f"{each.negative_log_likelihood:.4f}" for each in both]),
        ("Brier score", [f"{each.brier:.4f}" for each in both]),
    ]
    table = Table(
        "", ("", "as it is", "temperature fitted on the other half"), tuple(Row((name, *cells)) for name, cells in rows)
    )
    return Section("Calibration", about, (Plot("Reliability", note, picture),), (table,))


def _scores(pairs: PairEvaluation) -> Section:
    return Section(
        "Scores and margins",
        f"Scores have a mean of {pairs.scores.mean:+.2f} and a standard deviation of {pairs.scores.std:.2f}, margins "
        f"{pairs.margins.mean:+.2f} and {pairs.margins.std:.2f}.",
        (
            Plot(
                "Margins",
                "Score of the preferred response − score of the other; left of 0 the model is wrong.",
                plots.histogram(pairs.margins, "margin"),
            ),
            Plot(
                "Scores",
                "Of all texts. A policy compares them between prompts.",
                plots.histogram(pairs.scores, "score"),
            ),
        ),
    )


def _length_and_format(pairs: PairEvaluation) -> Section:
    length = pairs.length
    shown = []
    sides = [
        LabelledEstimate.of("longer one preferred", length.accuracy_longer_preferred),
        LabelledEstimate.of("shorter one preferred", length.accuracy_shorter_preferred),
    ]
    if any(each.value is not None for each in sides):
        note = "A model that only counts words is right on the first and wrong on the second."
        chance = [Reference(CHANCE, "chance", "dotted")]
        shown.append(Plot("Accuracy by length", note, plots.intervals(sides, chance, "accuracy", (0.45, 1.0))))
    features = [("length", pairs.pairs, length.overpayment.share)]
    features += [(each.name, each.pairs_that_differ, each.overpayment.share) for each in pairs.formats]
    estimates = [
        LabelledEstimate(name, found.value, found.low, found.high, count)
        for name, count, found in features
        if found.value is not None
    ]
    if estimates:
        note = (
            "Share of a typical score difference that is paid for more of it, beyond what people prefer it for; 0 is "
            "sound. Formats are compared at equal length."
        )
        zero = [Reference(0.0, "none", "dotted")]
        picture = plots.intervals(estimates, zero, "share", (-0.5, 0.5), form="+.2f", unit="pairs that differ")
        shown.append(Plot("What the score overpays", note, picture))
    about = "At equal scores, do people like the longer response, or the one with more formatting, less?"
    if length.longer_preferred.value is not None:
        about += f" People prefer the longer response in {interval_text(length.longer_preferred)}."
    if length.mean_length_difference is not None:
        about += f" The preferred one is longer by {length.mean_length_difference:+.1f} tokens on average."
    return Section("Length and format", about, tuple(shown))


def _disagreement(pairs: PairEvaluation) -> Section | None:
    report = pairs.disagreement
    if report is None:
        return None
    area = "undefined" if report.auroc.value is None else f"{report.auroc.value:.2f}"
    if report.auroc.low is not None:
        area += f" ({report.auroc.low:.2f}–{report.auroc.high:.2f})"
    return Section(
        "Disagreement",
        f"Does the ensemble know when it is wrong? The chance that a wrong pair has more disagreement than a right one "
        f"is {area}; one half says nothing.",
        (
            Plot(
                "Accuracy by disagreement",
                "A fifth of the pairs each; it should fall to the right.",
                plots.disagreement_bands(report),
            ),
            Plot(
                "Errors by coverage",
                "What setting aside the pairs of most disagreement gains; dotted: all pairs.",
                plots.risk_coverage(report),
            ),
        ),
    )


def _policy(report: EvaluationReport) -> Section | None:
    found = report.best_of_n
    if found is None:
        return None
    spread, agreement = found.spread, found.agreement
    rows = [("standard deviation of the reward within a prompt", f"{spread.within_prompt_std:.3f}")]
    if spread.between_prompt_share is not None:
        rows.append(("variance that lies between prompts", percent(spread.between_prompt_share)))
    rows.append(("prompts whose samples all have the same reward", percent(spread.flat_prompts)))
    if agreement.correlation is not None:
        text = f"{agreement.correlation:+.2f}"
        if agreement.low is not None:
            text += f" ({agreement.low:+.2f} to {agreement.high:+.2f})"
        rows.append((f"rank correlation of reward and {found.judge} within a prompt", text))
    if found.fit is not None:
        fit = found.fit
        peak = "no peak" if fit.peak_d is None else f"its peak is at d = {fit.peak_d:.2f}"
        rows.append(("gain d (α − β d), d = √KL", f"α {fit.alpha:.3g}, β {fit.beta:.3g}; {peak}"))
    if found.truncated_share is not None:
        rows.append(("responses cut off at the token limit", percent(found.truncated_share)))
    if found.failed_prompts:
        rows.append(("prompts left out for a sample without a score", f"{found.failed_prompts:,}"))
    note = "The reward (dashed) always rises. Where the judge (with interval) turns, the policy would learn mistakes."
    return Section(
        "Under a policy",
        f"{found.samples_per_prompt} samples for each of {found.prompts:,} prompts. The reward model picks the best of "
        f"n, {found.judge} says what the pick is worth. √KL is the currency in which PPO spends its KL, too.",
        (Plot("Best of n", note, plots.best_of_n(found)),),
        (
            Table("Rewards of the samples", (), tuple(Row(row) for row in rows)),
            Table(
                "Best of n against another sample, by the reward itself",
                ("n", "wins", "without equal scores"),
                tuple(Row((str(each.n), percent(each.value), percent(each.without_ties))) for each in found.win_rates),
            ),
        ),
    )


def _benchmarks(results: Sequence[BenchmarkResult]) -> Section | None:
    if not results:
        return None
    tables = []
    for result in results:
        overall = "no overall score" if result.overall is None else f"{100 * result.overall:.1f}"
        rows = [
            Row(
                (
                    each.name,
                    "–" if each.value is None else f"{100 * each.value:.1f}",
                    f"{each.num_cases:,} of {each.num_published:,}",
                )
            )
            for each in (*result.sections, *result.subsets)
        ]
        tables.append(Table(f"{result.name}: {overall}", ("", "score", "cases"), tuple(rows)))
    notes = [f"{each.name}: incomplete in {', '.join(each.incomplete)}." for each in results if each.incomplete]
    notes += [f"{each.name}: cases without a score: {each.num_unscored:,}." for each in results if each.num_unscored]
    notes += [
        f"{each.name}: cases with equal scores for right and wrong: {each.num_tied:,}."
        for each in results
        if each.num_tied
    ]
    about = (
        "By the published rules; sections first, then subsets. Without all published cases there is no overall score."
    )
    return Section("Benchmarks", about, (), tuple(tables), tuple(notes))


def _integrity(report: EvaluationReport) -> Section | None:
    if not report.checks:
        return None
    words = {False: ("failed", "bad"), None: ("not checked", "open"), True: ("passed", "good")}
    rows = [
        Row((words[check.passed][0], check.name, check.found, check.meaning), words[check.passed][1])
        for outcome in words
        for check in report.checks
        if check.passed is outcome
    ]
    about = (
        "Does the directory give everyone the scores that were judged here? Each check compares two ways to a score."
    )
    table = Table("", ("", "check", "found", "a failure means"), tuple(rows))
    return Section("Integrity", about, (), (table,))


def _data(report: EvaluationReport) -> Section | None:
    tables = []
    if report.failures:
        rows = tuple(Row((f"{count:,}", cause)) for cause, count in report.failures.items())
        tables.append(Table(f"{report.failed_texts:,} texts without a score", ("texts", "cause"), rows))
    if report.data is not None:
        tables.append(_sets(report.data))
    leakage = report.leakage or (None if report.data is None else report.data.leakage)
    if leakage is not None:
        tables.append(_leakage(leakage))
    if not tables:
        return None
    about = "What the model was trained on and judged by."
    if report.cut_pairs:
        about += f" {report.cut_pairs:,} of the pairs here were cut at the front."
    return Section("Data", about, (), tuple(tables))


def _leakage(leakage: Leakage) -> Table:
    def row(name: str, found: Matches) -> Row:
        return Row((name, f"{found.count:,}", percent(found.share), "; ".join(found.examples) or "–"))

    rows = (
        row("the whole pair", leakage.pairs),
        row("a whole text", leakage.texts),
        row("a response", leakage.responses),
        row("the prompt", leakage.prompts),
    )
    return Table("Pairs here that training had too", ("by", "pairs", "share", "the first"), rows)


def _sets(data: DataReport) -> Table:
    sets = [data.training] if data.held_out is None else [data.training, data.held_out]

    def matches(found: Matches) -> str:
        return f"{found.count:,} ({percent(found.share)})" if found.count else "0"

    def length(found: LengthReport | None) -> str:
        if found is None or found.preferred_mean is None or found.other_mean is None:
            return "–"
        return f"{found.preferred_mean:.1f} and {found.other_mean:.1f}"

    def sources(found: SetReport) -> str:
        return ", ".join(f"{each.name or '(none)'} {each.pairs:,}" for each in found.sources[:6])

    lines = [
        ("rows, of them bad", [f"{each.rows:,}, {each.bad_rows:,}" for each in sets]),
        ("pairs used", [f"{each.pairs:,}" for each in sets]),
        ("prompts", [f"{each.prompts:,}" for each in sets]),
        ("left out: gap, too long", [f"{each.left_out.small_gap:,}, {each.left_out.too_long:,}" for each in sets]),
        ("cut", [f"{each.left_out.cut:,}" for each in sets]),
        ("ties, soft labels", [f"{each.ties:,}, {each.soft_labels:,}" for each in sets]),
        ("duplicates", [matches(each.duplicates) for each in sets]),
        ("contradictions", [matches(each.contradictions) for each in sets]),
        ("preferred and other: tokens", [length(each.tokens) for each in sets]),
        ("preferred and other: characters", [length(each.characters) for each in sets]),
        ("longer one preferred", [interval_text((each.tokens or each.characters).longer_preferred) for each in sets]),
        ("sources", [sources(each) for each in sets]),
    ]
    columns = ("", "training", "held out")[: len(sets) + 1]
    return Table("Pairs", columns, tuple(Row((name, *cells)) for name, cells in lines))
