"""Whether live traffic still looks like what a reward model was judged on.

A window of live texts is compared with the reference in two quantities, the score and the length. For each the
Kolmogorov–Smirnov test decides; with α the false-alarm rate of a comparison, it alarms at p < α/2 (Bonferroni).

The rate is what it says under three conditions, and they shape this module. Windows are disjoint: a rolling window
looked at each second would be thousands of looks at the same texts. A text counts once in a window: 64 clients that
cycle over 100 texts are evidence of 100 texts. And texts are drawn independently: several responses to one prompt are
alike, so traffic of few prompts with many responses each alarms more often than α. A change is not a fault: PPO moves
its policy away from the reference on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import kolmogorov

from rlhf_ray.config.serving import DriftSettings
from rlhf_ray.reward.core.reference_scores import Distribution, ReferenceScores

_QUANTITIES = 2


@dataclass(frozen=True)
class Comparison:
    """One quantity of a window against the reference.

    Attributes:
        texts: in the window.
        mean, reference_mean, reference_std: in the unit of the quantity.
        ks: largest distance of the cumulative distributions at the reference's points, in [0, 1].
        p_value: of such a distance, or a larger one, where nothing has changed.
        alarm: the distance is larger than chance allows.
    """

    texts: int
    mean: float
    reference_mean: float
    reference_std: float
    ks: float
    p_value: float
    alarm: bool


@dataclass(frozen=True)
class Drift:
    """A window of texts against the reference."""

    score: Comparison
    length: Comparison

    @property
    def alarm(self) -> bool:
        return self.score.alarm or self.length.alarm


def compare(
    values: NDArray[np.float64], reference: Distribution, reference_texts: int, false_alarm_rate: float
) -> Comparison:
    """One quantity of live texts against the reference.

    The distance is that of the two-sample Kolmogorov–Smirnov test, taken at the reference's points only, and its
    p-value that of the limit distribution at n·m / (n + m) texts. Points left out and values that are tied, such as
    lengths, only make the distance smaller: the test is conservative.

    Args:
        values: `[n]`, finite.
        reference_texts: m, behind the reference.
        false_alarm_rate: of this comparison.
    """
    count = len(values)
    points, shares = np.array(reference.points), np.array(reference.shares)
    live_shares = np.searchsorted(np.sort(values), points, side="right") / count
    distance = float(np.abs(live_shares - shares).max())
    p_value = float(kolmogorov(np.sqrt(count * reference_texts / (count + reference_texts)) * distance))
    return Comparison(
        texts=count,
        mean=float(values.mean()),
        reference_mean=reference.mean,
        reference_std=reference.std,
        ks=distance,
        p_value=p_value,
        alarm=p_value < false_alarm_rate,
    )


@dataclass(frozen=True, eq=False)
class _Texts:
    """Scores, lengths and keys of n texts, `[n]` each."""

    scores: NDArray[np.float64]
    num_tokens: NDArray[np.float64]
    keys: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: slice | NDArray[np.generic]) -> _Texts:
        return _Texts(self.scores[index], self.num_tokens[index], self.keys[index])

    def __add__(self, later: _Texts) -> _Texts:
        return _Texts(
            np.concatenate([self.scores, later.scores]),
            np.concatenate([self.num_tokens, later.num_tokens]),
            np.concatenate([self.keys, later.keys]),
        )

    def first_of_each(self) -> NDArray[np.int64]:
        """Where each text occurs first, in order."""
        return np.sort(np.unique(self.keys, return_index=True)[1])


_NONE = _Texts(np.zeros(0), np.zeros(0), np.zeros(0, np.uint64))


class DriftWatch:
    """Live texts of one version of a model, compared window by window.

    Args:
        reference: of the same version.

    Attributes:
        windows: full, disjoint windows that were compared.
        alarms: of them, those that raised one.
        latest: the last full window, None before the first.
        failed_texts: left out, having no score.
        repeated_texts: left out, having been counted in their window.
    """

    def __init__(self, reference: ReferenceScores, settings: DriftSettings) -> None:
        self._reference, self._settings = reference, settings
        self._window = self._previous = _NONE
        self._next_key = 0
        self.windows = self.alarms = self.failed_texts = self.repeated_texts = 0
        self.latest: Drift | None = None

    def add(self, scores: ArrayLike, num_tokens: ArrayLike, keys: ArrayLike | None = None) -> tuple[Drift, ...]:
        """Take live texts in, and compare the windows that they complete.

        Args:
            scores: `[n]` raw scores, NaN where a text has none.
            num_tokens: `[n]`, as scored.
            keys: `[n]` uint64 hashes of the texts; None: all differ, from each other and from those before.
        """
        values = np.asarray(scores, dtype=np.float64)
        if keys is None:
            keys = np.arange(self._next_key, self._next_key + len(values), dtype=np.uint64)
            self._next_key += len(values)
        texts = _Texts(values, np.asarray(num_tokens, np.float64), np.asarray(keys, np.uint64))
        texts = texts[np.isfinite(values)]
        self.failed_texts += len(values) - len(texts)
        size, completed = self._settings.window_texts, []
        texts = self._window + texts
        while len(first := texts.first_of_each()) >= size:
            end = int(first[size - 1]) + 1
            self.repeated_texts += end - size
            self._previous, texts = texts[first[:size]], texts[end:]
            completed.append(self._compare(self._previous))
        self.repeated_texts += len(texts) - len(first)
        self._window = texts[first]
        self.windows += len(completed)
        self.alarms += sum(drift.alarm for drift in completed)
        self.latest = completed[-1] if completed else self.latest
        return tuple(completed)

    def rolling(self) -> Drift | None:
        """The latest `window_texts` different texts against the reference, to look at; None before `min_texts`.

        Its `alarm` is what the window would say if it ended here. Who counts alarms counts `alarms`.
        """
        texts = (self._previous + self._window)[::-1]
        texts = texts[texts.first_of_each()[: self._settings.window_texts]]
        return self._compare(texts) if len(texts) >= self._settings.min_texts else None

    def _compare(self, texts: _Texts) -> Drift:
        rate, reference = self._settings.false_alarm_rate / _QUANTITIES, self._reference
        return Drift(
            score=compare(texts.scores, reference.score, reference.texts, rate),
            length=compare(texts.num_tokens, reference.length, reference.texts, rate),
        )
