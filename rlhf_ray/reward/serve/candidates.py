"""How a candidate compares with the live model, and when it is rolled back.

A *shadow* scores the texts that the live model scored, so the two are compared text by text: a policy is trained by
the order of responses, so what counts first is how many pairs the shadow orders otherwise. A *canary* scores other
texts than the live model; what is left to compare is how often it fails, how long it takes and where its scores lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, t

from rlhf_ray.config.serving import CandidateSettings
from rlhf_ray.reward.serve.traffic import ModelWork, Pace

_WINDOW_TEXTS = 4096
_MIN_REQUEST_PAIRS = 100
"""With fewer pairs inside requests, all pairs say more."""
_LEVEL = 0.95

Interval = tuple[float, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SignFlips:
    """Pairs of texts that two models order differently.

    A pair that one model alone gives equal scores counts half, what it would be on average if the tie were broken at
    random. A pair that both give equal scores is left out.

    Attributes:
        rate: of the pairs, from 0 (the same order) through ½ (unrelated) to 1 (reversed).
        low, high: its 95 % interval.
        pairs: that it is the rate of.
    """

    rate: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class WorkFigures:
    """What a candidate and the live model did. A figure is None where there is nothing to compute it from.

    Attributes:
        candidate_texts, live_texts: that each was given.
        failure_rate, live_failure_rate: of those, without a score.
        latency_ratio: time a token, candidate / live.
    """

    candidate_texts: int
    live_texts: int
    failure_rate: float | None
    live_failure_rate: float | None
    latency_ratio: float | None

    @classmethod
    def of(cls, live: ModelWork, candidate: ModelWork, pace: Pace | None) -> WorkFigures:
        return cls(
            candidate_texts=candidate.texts,
            live_texts=live.texts,
            failure_rate=candidate.failures / candidate.texts if candidate.texts else None,
            live_failure_rate=live.failures / live.texts if live.texts else None,
            latency_ratio=pace.candidate_s / pace.main_s if pace else None,
        )


@dataclass(frozen=True)
class ScoreFigures:
    """A candidate's scores beside the live ones. A figure is None where there is nothing to compute it from.

    Attributes:
        score_shift: candidate's mean score − live mean score, in standard deviations of the live scores.
        kendall_tau: Kendall's τ-b of the scores.
        sign_flip_rate, sign_flip_low, sign_flip_high, sign_flip_pairs: `SignFlips`.
        sign_flips_within_requests: whether those are pairs of one request; else all pairs.
    """

    score_shift: float | None = None
    kendall_tau: float | None = None
    sign_flip_rate: float | None = None
    sign_flip_low: float | None = None
    sign_flip_high: float | None = None
    sign_flip_pairs: int = 0
    sign_flips_within_requests: bool = False


@dataclass(frozen=True)
class CandidateReport:
    """A candidate beside the live model.

    Attributes:
        texts: that both scored; of a canary, that the model with fewer texts scored.
    """

    texts: int
    work: WorkFigures
    scores: ScoreFigures

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """All figures in one object, as JSON takes it."""
        return {"texts": self.texts, **asdict(self.scores), **asdict(self.work)}


class _Works:
    """What a candidate and the live model did beside each other."""

    def __init__(self) -> None:
        self._live, self._candidate = ModelWork(), ModelWork()
        self._pace: Pace | None = None

    def add_work(self, live: ModelWork, candidate: ModelWork, pace: Pace | None = None) -> None:
        """Count what both did in the same time.

        Args:
            pace: how long they take for the same batch, as measured last.
        """
        self._live.add(live)
        self._candidate.add(candidate)
        self._pace = pace or self._pace

    def _work_figures(self) -> WorkFigures:
        return WorkFigures.of(self._live, self._candidate, self._pace)


class ShadowComparison(_Works):
    """The texts that both the live model and a shadow scored: the latest in full, all of them in number.

    Args:
        window_texts: latest texts that are compared.
    """

    def __init__(self, window_texts: int = _WINDOW_TEXTS) -> None:
        super().__init__()
        self._window_texts = window_texts
        self._scores = np.zeros((2, 0))
        self._groups = np.zeros(0, np.uint64)
        self._texts = 0
        self._figures: ScoreFigures | None = None

    def add(self, live_scores: ArrayLike, shadow_scores: ArrayLike, groups: ArrayLike) -> None:
        """Take in texts that both models were given.

        Args:
            live_scores, shadow_scores: `[n]` raw scores, NaN where there is none.
            groups: `[n]` uint64, the same for texts of one request.
        """
        live, shadow = np.asarray(live_scores, np.float64), np.asarray(shadow_scores, np.float64)
        both = np.isfinite(live) & np.isfinite(shadow)
        self._texts += int(both.sum())
        kept = slice(-self._window_texts, None)
        self._scores = np.concatenate([self._scores, [live[both], shadow[both]]], axis=1)[:, kept]
        self._groups = np.concatenate([self._groups, np.asarray(groups, np.uint64)[both]])[kept]
        self._figures = None

    def report(self) -> CandidateReport:
        """The comparison as it stands. Scores are those of the latest texts."""
        if self._figures is None:
            self._figures = self._compare_scores()
        return CandidateReport(self._texts, self._work_figures(), self._figures)

    def _compare_scores(self) -> ScoreFigures:
        live, shadow = self._scores
        if len(live) < 2:
            return ScoreFigures()
        everywhere = sign_flips(live, shadow)
        within = sign_flips_within(live, shadow, self._groups)
        flips = within if within is not None and within.pairs >= _MIN_REQUEST_PAIRS else everywhere
        live_std = float(live.std())
        # A constant's standard deviation may be a rounding error instead of 0.
        live_varies, varied = np.ptp(live) > 0, np.ptp(live) > 0 and np.ptp(shadow) > 0
        return ScoreFigures(
            score_shift=float((shadow - live).mean()) / live_std if live_varies else None,
            kendall_tau=float(kendalltau(live, shadow, method="asymptotic").statistic) if varied else None,
            sign_flip_rate=flips.rate if flips else None,
            sign_flip_low=flips.low if flips else None,
            sign_flip_high=flips.high if flips else None,
            sign_flip_pairs=flips.pairs if flips else 0,
            sign_flips_within_requests=flips is within and within is not None,
        )


class CanaryComparison(_Works):
    """A live model with a small share beside the one with the largest: unpaired, from counts alone."""

    def report(self) -> CandidateReport:
        """The comparison as it stands."""
        live, canary = self._live, self._candidate
        scored, live_scored = canary.texts - canary.failures, live.texts - live.failures
        shift: float | None = None
        if scored > 0 and live_scored > 0:
            live_mean = live.score_sum / live_scored
            variance = live.score_square_sum / live_scored - live_mean**2
            if variance > 1e-12 * live_mean**2:  # below that it is rounding
                shift = (canary.score_sum / scored - live_mean) / float(np.sqrt(variance))
        return CandidateReport(min(scored, live_scored), self._work_figures(), ScoreFigures(score_shift=shift))


def judge(comparison: ShadowComparison | CanaryComparison, settings: CandidateSettings) -> tuple[str, ...]:
    """Why a candidate is to be rolled back: a line for each rule that it breaks; none to keep it.

    Texts that the live model fails too are no fault of the candidate: its failure rate is allowed to be the live
    model's plus the setting. Sign flips are judged by the lower end of their interval, so that a handful of pairs
    decides nothing. Only failures are judged from texts that were given; a candidate that fails at all of them would
    otherwise never have scored enough to be judged.
    """
    return tuple(_broken_rules(comparison.report(), settings))


def _broken_rules(report: CandidateReport, settings: CandidateSettings) -> Iterator[str]:
    work, scores = report.work, report.scores
    if work.failure_rate is not None and min(work.candidate_texts, work.live_texts) >= settings.min_texts:
        live_rate = work.live_failure_rate or 0.0
        if work.failure_rate > live_rate + settings.max_failure_rate:
            yield (
                f"failures: {work.failure_rate:.1%} of {work.candidate_texts} texts have no score, with the live model "
                f"{live_rate:.1%}; candidates.max_failure_rate allows {settings.max_failure_rate:.1%} more"
            )
    if report.texts < settings.min_texts:
        return
    if work.latency_ratio is not None and work.latency_ratio > settings.max_latency_ratio:
        yield (
            f"latency: a token takes {work.latency_ratio:.2f} times as long as with the live model; "
            f"candidates.max_latency_ratio is {settings.max_latency_ratio:g}"
        )
    if scores.score_shift is not None and abs(scores.score_shift) > settings.max_score_shift:
        yield (
            f"score shift: the mean score lies {scores.score_shift:+.2f} standard deviations from the live model's; "
            f"candidates.max_score_shift is {settings.max_score_shift:g}"
        )
    if scores.sign_flip_low is not None and scores.sign_flip_low > settings.max_sign_flip_rate:
        yield (
            f"sign flips: {scores.sign_flip_rate:.1%} [{scores.sign_flip_low:.1%}, {scores.sign_flip_high:.1%}] of "
            f"{scores.sign_flip_pairs} pairs are ordered otherwise; candidates.max_sign_flip_rate is "
            f"{settings.max_sign_flip_rate:.1%}"
        )
    if scores.kendall_tau is not None and scores.kendall_tau < settings.min_kendall_tau:
        yield (
            f"rank correlation: Kendall's τ is {scores.kendall_tau:.3f}; candidates.min_kendall_tau is "
            f"{settings.min_kendall_tau:g}"
        )


def sign_flips(live: Floats, other: Floats) -> SignFlips | None:
    """Sign flips over all pairs of texts; None where no pair is ordered by either model.

    Counted through Kendall's S in O(n log n). The interval is Wilson's for n/2 pairs: a U-statistic of order two varies
    no more than the mean of that many independent pairs (Hoeffding 1948).

    Args:
        live, other: `[n]` finite scores.
    """
    count = len(live)
    pairs = count * (count - 1) // 2
    ties, other_ties, common = (_tied_pairs(each) for each in (live, other, np.stack([live, other], axis=1)))
    if pairs == common:
        return None
    ordered = (pairs - ties) * (pairs - other_ties)
    # τ-b is S / √((pairs − ties)(pairs − other ties)); S is concordant − discordant pairs, a whole number.
    s = round(kendalltau(live, other, method="asymptotic").statistic * ordered**0.5) if ordered else 0
    rate = 0.5 * (1 - s / (pairs - common))
    low, high = _wilson(rate, count / 2, float(t.isf((1 - _LEVEL) / 2, np.inf)))
    return SignFlips(rate, low, high, pairs - common)


def sign_flips_within(live: Floats, other: Floats, groups: NDArray[np.uint64]) -> SignFlips | None:
    """Sign flips over the pairs of texts in the same group; None where there is no such pair.

    Pairs of one group are alike. The interval is Wilson's at the effective number of pairs, r(1 − r) / variance with
    the linearised variance of a ratio over groups, and at Student's t of groups − 1, after Korn & Graubard (1998).

    Args:
        live, other: `[n]` finite scores.
        groups: `[n]`.
    """
    order = np.argsort(groups, kind="stable")
    live, other = live[order], other[order]
    names, inverse = np.unique(groups[order], return_inverse=True)
    flips, pairs = np.zeros(len(names)), np.zeros(len(names))
    for distance in range(1, int(np.bincount(inverse).max(initial=0))):
        first = np.flatnonzero(inverse[:-distance] == inverse[distance:])
        signs = np.sign(live[first] - live[first + distance])
        other_signs = np.sign(other[first] - other[first + distance])
        group = inverse[first]
        flips += np.bincount(group, 0.5 * np.abs(signs - other_signs), len(names))
        pairs += np.bincount(group, (signs != 0) | (other_signs != 0), len(names))
    flips, pairs = flips[pairs > 0], pairs[pairs > 0]
    total, num_groups = pairs.sum(), len(pairs)
    if not num_groups:
        return None
    rate = float(flips.sum() / total)
    if num_groups == 1:
        return SignFlips(rate, 0.0, 1.0, int(total))
    variance = num_groups / (num_groups - 1) * ((flips - rate * pairs) ** 2).sum() / total**2
    # Without any variation between groups, such as without any flip, each group is one piece of evidence.
    effective = min(rate * (1 - rate) / variance, total) if variance > 0 else num_groups
    low, high = _wilson(rate, float(effective), float(t.isf((1 - _LEVEL) / 2, num_groups - 1)))
    return SignFlips(rate, low, high, int(total))


def _tied_pairs(values: NDArray[np.float64]) -> int:
    counts = np.unique(values, axis=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _wilson(rate: float, count: float, critical: float) -> Interval:
    """Wilson's score interval (1927) of a rate from independent draws."""
    square = critical**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    reach = critical / (1 + square / count) * (rate * (1 - rate) / count + square / (4 * count**2)) ** 0.5
    return max(centre - reach, 0.0), min(centre + reach, 1.0)
