"""Which pairs are no independent evidence, and intervals that allow for it.

Pairs of one prompt share its difficulty, and pairs with a text in common share whatever the model and the raters make
of that text, under whatever prompt: 2,000 pairs made of 60 snippets tell as much as a few hundred. Every figure over
pairs is, up to sampling error, a sum of one term a pair (its influence), so its variance is the sum of the products of
the terms of all pairs that are related, which may be any two with a prompt or a text in common (Cameron, Gelbach &
Miller 2011 for several groupings at once; Aronow, Samii & Assenova 2015 for pairs, called dyads there).

A percentile bootstrap over ten groups covers the truth in four cases of five where it claims nineteen of twenty, and a
bootstrap over texts counts the noise of a pair's own label twice or more. Hence variances in closed form, with
Student's t at the number of groups that would be as good as these (fewer where they differ in size).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from rlhf_ray.data.preferences import PreferencePair

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there is none."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Proportion(Estimate):
    """A share in [0, 1] with its interval.

    Attributes:
        count: pairs that it is the share of.
    """

    count: int


UNKNOWN = Estimate(None, None, None)


@dataclass(frozen=True, eq=False)
class Groups:
    """What P pairs have in common.

    Attributes:
        prompts: `[P]`, equal numbers for pairs of one prompt.
        texts: `[P, 2]`, equal numbers for equal texts.
    """

    prompts: NDArray[np.int64]
    texts: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair]) -> Groups:
        """By prompt and whole text (prompt + response).

        A row without a prompt is a group of its own; so are all rows where there is one prompt only, which then is no
        sample of prompts.
        """
        named = {pair.prompt for pair in pairs if pair.prompt.strip()}
        prompts = [pair.prompt if pair.prompt.strip() and len(named) > 1 else place for place, pair in enumerate(pairs)]
        texts = [pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected)]
        return cls(_numbered(prompts), _numbered(texts).reshape(-1, 2))

    @classmethod
    def by(cls, names: Iterable[Hashable]) -> Groups:
        """Pairs that share nothing but what they are named by."""
        prompts = _numbered(names)
        return cls(prompts, np.arange(2 * len(prompts)).reshape(-1, 2))

    @property
    def count(self) -> int:
        """Of prompts."""
        return len(np.unique(self.prompts))

    @cached_property
    def _terms(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Groupings with the signs that make their sums of products those over related pairs, each pair of pairs once.

        Prompts + texts − both, where sharing both texts counts twice among the texts. Groups are numbered from 0; one
        with twice as many entries as there are pairs has each pair in two groups.
        """
        prompts, texts = _renumbered(self.prompts), _renumbered(np.sort(self.texts, axis=1).T.ravel())
        first, second = np.split(texts, 2)
        both = _renumbered(first * (texts.max(initial=0) + 1) + second)
        homes = np.concatenate([prompts, prompts])
        within = _renumbered(texts * (prompts.max(initial=0) + 1) + homes)
        if within.max(initial=0) == texts.max(initial=0):
            # No text under two prompts: all that pairs share, they share within a prompt.
            return [(1, prompts)]
        both_within = _renumbered(both * (prompts.max(initial=0) + 1) + prompts)
        return [(1, prompts), (1, texts), (-1, both), (-1, within), (1, both_within)]

    def covariance(self, influence: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[K, K]`: sum over all related pairs i, j (each with itself, too) of the outer products of rows i and j.

        Args:
            influence: `[P, K]`; what each pair adds to each of K figures.
        """
        found = np.zeros((influence.shape[1], influence.shape[1]))
        for sign, places in self._terms:
            rows = influence if len(places) == len(influence) else np.concatenate([influence, influence])
            sums = np.stack([np.bincount(places, column) for column in rows.T], axis=1)
            found += sign * (sums.T @ sums)
        return found

    def effective(self, weights: NDArray[np.float64]) -> float:
        """Number of equal groups that would tell as much, (Σ w)² / Σ over related pairs of w w; 0 without weight.

        Args:
            weights: `[P]`; 1 for pairs that count.
        """
        related = float(self.covariance(weights[:, None])[0, 0])
        return float(weights.sum()) ** 2 / related if related > 0 else 0.0

    def variance(self, influence: NDArray[np.float64], effective: float) -> float:
        """Of a figure, with the correction for few groups.

        With texts under several prompts the sum over related pairs may come out near or below 0 by chance; less than
        half of what independent pairs would have is not believed.
        """
        found = float(self.covariance(influence[:, None])[0, 0])
        if len(self._terms) > 1:
            found = max(found, 0.5 * float(influence @ influence))
        return found * effective / (effective - 1)

    def interval(
        self,
        value: float,
        influence: NDArray[np.float64],
        *,
        counted: NDArray[np.bool_] | None = None,
        more_variance: float = 0.0,
        level: float = LEVEL,
    ) -> Estimate:
        """Student's t interval of a figure; without two groups there is none.

        Args:
            influence: `[P]`, what each pair adds to the figure's deviation from its expectation.
            counted: `[P]`, pairs that the figure is over; None: all.
            more_variance: that does not come from the pairs.
        """
        effective = self.effective(np.ones(len(influence)) if counted is None else counted.astype(np.float64))
        if effective < 2:
            return Estimate(value, None, None)
        reach = _quantile(effective, level) * math.sqrt(self.variance(influence, effective) + more_variance)
        return Estimate(value, value - reach, value + reach)

    def share(self, values: ArrayLike, level: float = LEVEL) -> Proportion:
        """Mean of values in [0, 1] with its interval, NaN left out.

        Wilson's interval (1927) for as many independent trials as would have this variance, with Student's t for the
        normal quantile (Dean & Pagano 2015). Where no value differs the pairs show no variance, and groups are trials.
        """
        table = np.asarray(values, dtype=np.float64)
        counted = ~np.isnan(table)
        count = int(counted.sum())
        if not count:
            return Proportion(None, None, None, 0)
        value = float(table[counted].mean())
        effective = self.effective(counted.astype(np.float64))
        if effective < 2:
            return Proportion(value, None, None, count)
        found = self.wilson(value, np.where(counted, table - value, 0.0) / count, effective, level)
        return Proportion(value, found.low, found.high, count)

    def wilson(self, value: float, influence: NDArray[np.float64], effective: float, level: float = LEVEL) -> Estimate:
        """Wilson's interval of a probability, as `share` has it.

        Args:
            value: in [0, 1].
            influence: `[P]`, see `interval`.
            effective: groups that it rests on, at least 2.
        """
        variance = self.variance(influence, effective)
        spread = value * (1 - value)
        trials = spread / variance if variance > 1e-12 else effective
        squared = _quantile(effective, level) ** 2 / trials
        middle = (value + squared / 2) / (1 + squared)
        reach = math.sqrt(squared * (spread + squared / 4)) / (1 + squared)
        return Estimate(value, max(middle - reach, 0.0), min(middle + reach, 1.0))


def mean_with_interval(values: NDArray[np.float64], level: float = LEVEL) -> Estimate:
    """Of independent values `[n]`, n ≥ 1."""
    mean = float(values.mean())
    return Groups.by(range(len(values))).interval(mean, (values - mean) / len(values), level=level)


def _quantile(effective: float, level: float) -> float:
    return float(stdtrit(effective - 1, (1 + level) / 2))


def _numbered(names: Iterable[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _renumbered(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(numbers, return_inverse=True)[1]
