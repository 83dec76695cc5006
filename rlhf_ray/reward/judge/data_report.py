"""What is in the comparisons, before anything is trained on them: labels, repeats, lengths, raters, leakage.

Texts count as the same when they differ only in Unicode form, case or white space (`leakage.normalised`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.preferences import PreferencePair, PreferenceSet, attribute_names
from rlhf_ray.reward.judge.findings import Finding, Severity, counted, percent
from rlhf_ray.reward.judge.groups import Groups, Proportion
from rlhf_ray.reward.judge.label_noise import RaterCeiling, rater_ceiling
from rlhf_ray.reward.judge.leakage import NUM_EXAMPLES, Leakage, Matches, PairHashes, TrainingTexts, find, hash_pairs

# From these on, there is a finding.
LONGER_PREFERRED_SHARE = 0.6
NOTICEABLE_SHARE = 0.01
LEFT_OUT_SHARE = 0.05
LOW_CEILING = 0.75
LEAKED_PROMPTS = 0.05  # A few prompts return in any collection.


@dataclass(frozen=True)
class LeftOut:
    """What became of pairs on their way to the model.

    Attributes:
        small_gap: pairs left out for their gap.
        too_long: pairs left out for a text that is too long.
        cut: pairs that are used, but of which a text was cut.
    """

    small_gap: int = 0
    too_long: int = 0
    cut: int = 0


@dataclass(frozen=True)
class SourceCount:
    """Pairs of one source; name None for those that name none."""

    name: str | None
    pairs: int


@dataclass(frozen=True)
class LengthReport:
    """Length of the preferred response beside the other, over pairs with a preference.

    Attributes:
        preferred_mean, other_mean: lengths.
        gap_mean: mean of preferred − other.
        longer_preferred: share of the pairs of different lengths in which the longer one is preferred.
        longest: of all lengths, ties included.
    """

    preferred_mean: float | None
    other_mean: float | None
    gap_mean: float | None
    longer_preferred: Proportion
    longest: float


@dataclass(frozen=True)
class VoteReport:
    """Pairs that come with votes.

    Attributes:
        pairs: with at least two votes.
        unanimous: share of them with one opinion only.
        agreement: chance that two different raters of a pair say the same (one, the other, or tie), the mean over
            pairs of Σ v(v−1) / n(n−1). Unlike p² + (1−p)² it does not count a rater as agreeing with himself.
    """

    pairs: int
    unanimous: float
    agreement: float


@dataclass(frozen=True)
class GapReport:
    """Distribution of `gap` over the pairs that have it."""

    pairs: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class AttributeReport:
    """One attribute.

    Attributes:
        pairs: that have it.
        share: of all pairs, from 0 to 1.
        ties: pairs in which neither response is better on it.
        agreement: share of pairs in which it and the overall preference, where both decide, point the same way.
    """

    name: str
    pairs: int
    share: float
    ties: int
    agreement: Proportion


@dataclass(frozen=True)
class SetReport:
    """One set of pairs, as it is used.

    Attributes:
        rows: read, good and bad.
        bad_rows: left out; `bad_row_messages` has the first ten.
        identical_rows: rows whose responses are the same text, used only where they are labelled as ties.
        left_out: for gap or length, and cut.
        pairs: that are used; all that follows is about them.
        prompts: different ones (0 where the rows hold whole texts).
        sources: from the most frequent on.
        ties: pairs labelled one half.
        soft_labels: pairs whose label is neither 0, 1 nor one half.
        rejected_preferred: pairs labelled below one half.
        alike: pairs with a preference between responses that differ only in case, Unicode form or white space.
        duplicates: pairs that repeat another with its label's direction; the first of them does not count.
        contradictions: pairs that another contradicts, which has the same two texts and the opposite preference:
            of each such group the smaller side, which any reward model gets wrong.
        characters, tokens: lengths of the responses in characters, and of the whole texts in tokens where given.
        raters: ceiling implied by the labels.
        votes, gaps: None where no pair has them.
        attributes: by name.
    """

    rows: int
    bad_rows: int
    bad_row_messages: tuple[str, ...]
    identical_rows: int
    left_out: LeftOut
    pairs: int
    prompts: int
    sources: tuple[SourceCount, ...]
    ties: int
    soft_labels: int
    rejected_preferred: int
    alike: Matches
    duplicates: Matches
    contradictions: Matches
    characters: LengthReport
    tokens: LengthReport | None
    raters: RaterCeiling
    votes: VoteReport | None
    gaps: GapReport | None
    attributes: tuple[AttributeReport, ...]


@dataclass(frozen=True)
class DataReport:
    """Training and held-out pairs, and what of the latter the model has seen.

    Attributes:
        leakage: held-out pairs that are also in training, or in validation, by which the model was chosen.
        validation_leakage: validation pairs that are also in training; None without validation pairs.
    """

    training: SetReport
    held_out: SetReport | None
    leakage: Leakage | None
    validation_leakage: Leakage | None


def report_data(
    training: PreferenceSet,
    held_out: PreferenceSet | None = None,
    validation: PreferenceSet | None = None,
    *,
    training_tokens: NDArray[np.int64] | None = None,
    held_out_tokens: NDArray[np.int64] | None = None,
    training_left_out: LeftOut = LeftOut(),
    held_out_left_out: LeftOut = LeftOut(),
) -> DataReport:
    """Look at pairs before training on them.

    Args:
        training, held_out, validation: their `pairs` are those that are used (after `min_gap` and the limit of length).
        training_tokens, held_out_tokens: `[P, 2]`, tokens of the whole chosen and rejected text of each pair.
        training_left_out, held_out_left_out: what happened to pairs that are not in the sets, or not in full.
    """
    seen = [hash_pairs(training.pairs)]
    report = DataReport(_report_set(training, seen[0], training_tokens, training_left_out), None, None, None)
    if validation is not None:
        hashes = hash_pairs(validation.pairs)
        report = replace(report, validation_leakage=TrainingTexts.of(*seen).leakage(hashes))
        seen.append(hashes)
    if held_out is not None:
        hashes = hash_pairs(held_out.pairs)
        report = replace(
            report,
            held_out=_report_set(held_out, hashes, held_out_tokens, held_out_left_out),
            leakage=TrainingTexts.of(*seen).leakage(hashes),
        )
    return report


def lines(report: DataReport) -> list[str]:
    """The report in a dozen lines, for the terminal."""
    told = _set_lines("training", report.training)
    if report.held_out is not None:
        # Repeats and attributes matter for training; of the rest, a held-out set shows whether it is like training.
        told += _set_lines("held out", report.held_out)[:3]
    for name, seen, leakage in _leaks(report):
        found = ", ".join(
            f"{what} {finding.count:,} ({percent(finding.share)})"
            for what, finding in (
                ("whole pair", leakage.pairs),
                ("a text", leakage.texts),
                ("a response", leakage.responses),
                ("the prompt", leakage.prompts),
            )
        )
        told.append(f"{name} pairs also in {seen}: {found}")
    return told


def data_findings(report: DataReport, *, held_out_leaks: bool = True) -> Iterator[Finding]:
    """What looks wrong, and what it means for training; nothing where nothing does.

    Args:
        held_out_leaks: false where the held-out pairs are looked at elsewhere.
    """
    yield from _set_findings("training", report.training)
    if report.held_out is not None:
        yield from _set_findings("held-out", report.held_out)
    for name, seen, leakage in _leaks(report):
        if held_out_leaks or name != "held-out":
            yield from leaks_found(name, seen, leakage)


def leaks_found(name: str, seen: str, leakage: Leakage | None, *, texts: bool = True) -> Iterator[Finding]:
    """What a set of pairs has in common with what it must be new to.

    Args:
        name, seen: of the two.
        texts: also whole texts.
    """
    if leakage is None:
        return
    if leakage.texts.count:
        if texts:
            yield Finding(
                "leakage",
                f"{_told(leakage.texts)} of the {name} set have a text that is also in {seen}, "
                f"{leakage.pairs.count:,} of them both{_first(leakage.texts)}.",
                "Accuracy on them is memory, not judgement.",
                "Split by text.",
                "high",
            )
    elif leakage.prompts.share > LEAKED_PROMPTS:
        yield Finding(
            "leakage",
            f"{_told(leakage.prompts)} of the {name} set have a prompt that is also in {seen}"
            f"{_first(leakage.prompts)}.",
            "Accuracy is that on new responses to known prompts; on new prompts it is lower by an unknown amount.",
            "Split by prompt if the policy will meet new ones.",
            "medium",
        )
    if leakage.responses.share - leakage.texts.share >= NOTICEABLE_SHARE:
        yield Finding(
            "leakage",
            f"{_told(leakage.responses)} of the {name} set have a response that is also in {seen}, some under other "
            f"prompts{_first(leakage.responses)}.",
            "A score that ignores the prompt would look right on them.",
            "Split by response, or draw the rejected ones anew.",
            "low",
        )


def low_ceiling(name: str, ceiling: RaterCeiling) -> Iterator[Finding]:
    """Raters of a set whose votes decide too little."""
    if ceiling.accuracy is not None and ceiling.accuracy < LOW_CEILING:
        yield Finding(
            name,
            f"The votes decide so little that no model can match more than {percent(ceiling.accuracy)} of single ones: "
            "raters disagree, or call it a tie, which counts half for either.",
            "The labels limit the reward model, and noisy ones bring over-optimisation nearer.",
            "More raters a pair, clearer instructions, or pairs.min_gap to train on the clear ones; they say more than "
            "a larger model.",
            "medium",
        )


def _leaks(report: DataReport) -> Iterator[tuple[str, str, Leakage]]:
    """Each set that is to be new to the model, what it must not have in common with, and what it has."""
    if report.leakage is not None:
        yield "held-out", "training" if report.validation_leakage is None else "training or validation", report.leakage
    if report.validation_leakage is not None:
        yield "validation", "training", report.validation_leakage


def _report_set(
    preferences: PreferenceSet, hashes: PairHashes, tokens: NDArray[np.int64] | None, left_out: LeftOut
) -> SetReport:
    pairs = preferences.pairs
    probability = np.array([pair.chosen_probability for pair in pairs])
    direction = np.sign(probability - 0.5)
    characters = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    if tokens is not None and tokens.shape != characters.shape:
        raise ValueError(f"token counts of shape {tokens.shape} for {len(pairs)} pairs")
    duplicates, contradictions = _repeats(hashes, direction)
    groups = Groups.of(pairs)
    sources = Counter(pair.source for pair in pairs)
    return SetReport(
        rows=preferences.num_rows,
        bad_rows=preferences.num_skipped,
        bad_row_messages=tuple(preferences.bad_rows.messages),
        identical_rows=preferences.num_identical,
        left_out=left_out,
        pairs=len(pairs),
        prompts=len(np.unique(hashes.prompts[hashes.prompts != 0])),
        sources=tuple(SourceCount(name, count) for name, count in sources.most_common()),
        ties=int((direction == 0).sum()),
        soft_labels=int(((probability > 0) & (probability < 1) & (direction != 0)).sum()),
        rejected_preferred=int((direction < 0).sum()),
        alike=find(hashes.places, hashes.same & (direction != 0)),
        duplicates=duplicates,
        contradictions=contradictions,
        characters=_lengths(characters, direction, groups),
        tokens=None if tokens is None else _lengths(tokens, direction, groups),
        raters=rater_ceiling(pairs),
        votes=_votes(pairs),
        gaps=_gaps(pairs),
        attributes=tuple(_attribute(name, pairs, direction, groups) for name in attribute_names(pairs)),
    )


def _repeats(hashes: PairHashes, direction: NDArray[np.float64]) -> tuple[Matches, Matches]:
    """Duplicates and contradictions, each example with the place that it repeats or contradicts."""
    # The preference as seen from the text with the smaller hash: the same for a pair and its turned copy.
    sides = np.where(hashes.same, 0, np.where(hashes.texts[:, 0] < hashes.texts[:, 1], 1, -1) * direction)
    groups: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, side, place in zip(hashes.pairs[:, 0].tolist(), sides.tolist(), hashes.places, strict=True):
        groups[key][int(side)].append(place)
    duplicates: list[str] = []
    contradictions: list[str] = []
    for group in groups.values():
        for places in group.values():
            duplicates += [f"{place} repeats {places[0]}" for place in places[1:]]
        if 1 in group and -1 in group:
            larger, smaller = sorted((group[1], group[-1]), key=len, reverse=True)
            contradictions += [f"{place} contradicts {larger[0]}" for place in smaller]
    repeats, contradicted = (
        Matches(len(found), len(found) / len(hashes.places), tuple(found[:NUM_EXAMPLES]))
        for found in (duplicates, contradictions)
    )
    return repeats, contradicted


def _lengths(lengths: NDArray[np.int64], direction: NDArray[np.float64], groups: Groups) -> LengthReport:
    longest = float(lengths.max())
    turned = np.where(direction[:, None] < 0, lengths[:, ::-1], lengths).astype(np.float64)
    gaps = turned[:, 0] - turned[:, 1]
    decided = direction != 0
    longer = groups.share(np.where(decided & (gaps != 0), gaps > 0, np.nan))
    if not decided.any():
        return LengthReport(None, None, None, longer, longest)
    preferred, other, gap = (float(values[decided].mean()) for values in (turned[:, 0], turned[:, 1], gaps))
    return LengthReport(preferred, other, gap, longer, longest)


def _votes(pairs: Sequence[PreferencePair]) -> VoteReport | None:
    counts = np.array(
        [(pair.votes.chosen, pair.votes.rejected, pair.votes.tie) for pair in pairs if pair.votes is not None]
    ).reshape(-1, 3)
    raters = counts.sum(axis=1)
    counts, raters = counts[raters >= 2], raters[raters >= 2]
    if not len(raters):
        return None
    agreement = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))
    return VoteReport(len(raters), float((counts.max(axis=1) == raters).mean()), float(agreement.mean()))


def _gaps(pairs: Sequence[PreferencePair]) -> GapReport | None:
    gaps = [pair.gap for pair in pairs if pair.gap is not None]
    if not gaps:
        return None
    return GapReport(len(gaps), *(float(value) for value in np.quantile(gaps, [0, 0.25, 0.5, 0.75, 1])))


def _attribute(
    name: str, pairs: Sequence[PreferencePair], direction: NDArray[np.float64], groups: Groups
) -> AttributeReport:
    signs = np.array([np.sign(pair.attributes.get(name, np.nan)) for pair in pairs])
    present = ~np.isnan(signs)
    both = present & (signs != 0) & (direction != 0)
    count = int(present.sum())
    return AttributeReport(
        name=name,
        pairs=count,
        share=count / len(pairs),
        ties=int((signs == 0).sum()),
        agreement=groups.share(np.where(both, signs == direction, np.nan)),
    )


def _set_lines(name: str, data: SetReport) -> list[str]:
    counts = {
        "bad rows left out": data.bad_rows,
        "left out for their gap": data.left_out.small_gap,
        "left out as too long": data.left_out.too_long,
        "cut": data.left_out.cut,
    }
    rest = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    told = [f"{name}: {data.pairs:,} pairs of {data.rows:,} rows, {data.prompts:,} prompts{rest}"]
    labels = f"  labels: {data.ties:,} ties, {data.soft_labels:,} soft, {data.rejected_preferred:,} below one half"
    if data.votes is not None:
        labels += f"; two raters agree on {percent(data.votes.agreement)}"
    if data.raters.accuracy is not None:
        labels += f"; no model can match more than {percent(data.raters.accuracy)} of single votes"
    told.append(labels)
    told.append("  length: " + ", ".join(_length_parts(data)))
    told.append(
        f"  repeats: {data.duplicates.count:,} duplicates, {data.contradictions.count:,} contradictions, "
        f"{data.identical_rows:,} rows with chosen = rejected, {data.alike.count:,} pairs nearly so"
    )
    if data.gaps is not None:
        gaps = data.gaps
        told.append(
            f"  gap: {gaps.minimum:.2f} to {gaps.maximum:.2f}, half of the pairs from {gaps.lower_quartile:.2f} to "
            f"{gaps.upper_quartile:.2f}"
        )
    if len(data.sources) > 1:
        told.append("  sources: " + _some([f"{each.name or '(none)'} {each.pairs:,}" for each in data.sources]))
    if data.attributes:
        parts = [
            f"{each.name} in {percent(each.share)}"
            + ("" if each.agreement.value is None else f" (with the preference {percent(each.agreement.value)})")
            for each in data.attributes
        ]
        told.append("  attributes: " + _some(parts))
    return told


def _length_parts(data: SetReport) -> list[str]:
    parts = []
    lengths = data.tokens or data.characters
    if lengths.longer_preferred.value is not None:
        parts.append(f"the longer is preferred in {percent(lengths.longer_preferred.value)}")
    for unit, each in (("tokens", data.tokens), ("characters", data.characters)):
        if each is not None and each.gap_mean is not None:
            parts.append(f"by {each.gap_mean:+.1f} {unit} on average")
    parts.append(f"the longest {'text' if data.tokens else 'response'} has {lengths.longest:,.0f}")
    return parts


def _set_findings(name: str, data: SetReport) -> Iterator[Finding]:
    def finding(found: str, meaning: str, lever: str, severity: Severity) -> Finding:
        return Finding(f"{name} pairs", found, meaning, lever, severity)

    lost = data.bad_rows + data.left_out.too_long
    if lost / data.rows >= LEFT_OUT_SHARE:
        yield finding(
            f"{lost:,} of {data.rows:,} rows ({percent(lost / data.rows)}) are bad or too long and left out.",
            "What remains may not be like the whole.",
            "Mend the rows; for long ones a larger training.max_length.",
            "medium",
        )
    if data.left_out.cut / data.pairs >= LEFT_OUT_SHARE:
        yield finding(
            f"{data.left_out.cut:,} pairs ({percent(data.left_out.cut / data.pairs)}) are cut at the front and judged "
            "without their beginning.",
            "Where the question is cut off, the model judges an answer to nothing.",
            "A larger training.max_length.",
            "medium",
        )
    if data.rejected_preferred > data.pairs / 2:
        yield finding(
            f"In {data.rejected_preferred:,} of {data.pairs:,} pairs the label prefers the rejected response.",
            "The columns or the labels are probably the wrong way round.",
            "See which column is the preferred one.",
            "high",
        )
    if data.contradictions.count:
        yield finding(
            f"{_told(data.contradictions)} are contradicted by others with the same texts"
            f"{_first(data.contradictions)}.",
            "Any reward model is wrong on them, and learns to be unsure of everything alike.",
            "If they are opinions of several raters, one row with `votes` for each comparison.",
            "medium" if data.contradictions.share > NOTICEABLE_SHARE else "low",
        )
    if data.duplicates.share >= NOTICEABLE_SHARE:
        yield finding(
            f"{_told(data.duplicates)} repeat others{_first(data.duplicates)}.",
            "Each repeat weighs as much as a new pair, and is no new evidence.",
            "Keep one of each, with a `weight` if it is to count for more.",
            "low",
        )
    if data.alike.count:
        yield finding(
            f"{_told(data.alike)} prefer one of two responses that differ only in case, Unicode form or white space"
            f"{_first(data.alike)}.",
            "What is learnt there is format.",
            "Leave them out, or label them as ties.",
            "low",
        )
    yield from _length_findings(name, data)
    yield from low_ceiling(f"{name} pairs", data.raters)
    for each in data.attributes:
        if each.agreement.high is not None and each.agreement.high < 0.5:
            yield finding(
                f"The attribute '{each.name}' points the way of the overall preference in only "
                f"{counted(each.agreement)} that have both.",
                "Its head learns the opposite of what it is named after, if its sign is turned.",
                "Larger numbers must be better.",
                "medium",
            )


def _length_findings(name: str, data: SetReport) -> Iterator[Finding]:
    """Of the two measures of length the one that the model sees, if it is known; never for a handful of pairs."""
    longer = (data.tokens or data.characters).longer_preferred
    share, low, high = longer.value, longer.low, longer.high
    if share is None or low is None or high is None or low <= 0.5 <= high:
        return
    if share <= LONGER_PREFERRED_SHARE and 1 - share <= LONGER_PREFERRED_SHARE:
        return
    which, often = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
    # The penalty is for length that is overpaid; it never rewards length.
    otherwise = ", or keep length out of the score (aggregation.length_penalty: fitted)" if which == "longer" else ""
    yield Finding(
        f"{name} pairs",
        f"The {which} response is preferred in {percent(often)} of the pairs.",
        "A reward model can reach that by length alone, and a policy trained against it drifts in length.",
        f"Balance the pairs{otherwise}.",
        "medium",
    )


def _told(matches: Matches) -> str:
    return f"{matches.count:,} pairs ({percent(matches.share)})"


def _first(matches: Matches) -> str:
    return f" (the first: {matches.examples[0]})"


def _some(parts: Sequence[str], limit: int = 6) -> str:
    return ", ".join(parts[:limit]) + (f" and {len(parts) - limit} more" if len(parts) > limit else "")
