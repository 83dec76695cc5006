"""Calibration: does σ(score difference) mean what it says, that so many people prefer the response?

Expected calibration error (ECE; Naeini et al. 2015, Guo et al. 2017) sorts predicted probabilities into bins of equal
width and averages |mean prediction − frequency| over the pairs. Three things make the number misleading.

*Orientation.* In rows of `chosen` and `rejected` the label is always 1, and the frequency of every bin with it: the
labels have chosen the orientation. And bins over [0, 1] hold both orientations of doubtful pairs, whose errors cancel
around one half, so that a model which is never sure seems calibrated. So each pair is seen from the response with the
higher score: predictions lie in [½, 1], and the frequency is how often people agree.

*Labels.* The prediction is of a share of people, so it is held against the shares as they are: against the majority a
perfect model looks unsure of itself.

*Sampling.* A perfectly calibrated model has an ECE above 0 on a finite sample, about 0.02 at 2,000 pairs with one vote
each, less where pairs have many votes, more where pairs are related. This floor is estimated from the residuals,
whose spread shows all of that, and reported with every ECE: only what is above it is miscalibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_expit

from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.judge.accuracy import check_pairs
from rlhf_ray.reward.judge.groups import LEVEL, Estimate, Groups

BINS = 10
PAIRS_PER_BIN = 50
TEMPERATURE_BOUNDS = (0.01, 100.0)
"""In root mean squares of the differences, whose unit is arbitrary."""
SIMULATIONS = 2000


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose predicted probability lies in [low, high).

    Attributes:
        count: pairs.
        confidence: mean predicted probability, None without pairs.
        frequency: mean share of people who prefer the response with the higher score, None without pairs.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    frequency: float | None


@dataclass(frozen=True)
class SamplingFloor:
    """ECE of a perfectly calibrated model with these predictions on as many pairs: its mean and 95 % quantile."""

    mean: float
    quantile_95: float


@dataclass(frozen=True)
class Calibration:
    """Of scores divided by `temperature`.

    Attributes:
        ece: expected calibration error.
        floor: what sampling alone makes of it.
        excess: ECE above the floor's mean, with the interval that the floor's 95 % leave: its whole is below 0 where
            the model is better than sampling allows, above 0 where it is miscalibrated. That is a test of calibration,
            and covers the truth in 95 of 100 cases where the model is calibrated. The error of a miscalibrated one
            varies by more, and an interval that allowed for it would tell no sound model from a faulty one on a few
            hundred pairs.
        bins: of the reliability plot; the `ece` is the average of |confidence − frequency| over them.
        negative_log_likelihood: mean over pairs, in nats, against the labels as they are (soft ones included).
        brier: mean squared error against the vote of one rater, drawn by the label.
        count: pairs.
    """

    ece: float
    floor: SamplingFloor
    excess: Estimate
    bins: tuple[ReliabilityBin, ...]
    temperature: float
    negative_log_likelihood: float
    brier: float
    count: int


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature T with which σ(difference / T) fits the labels best.

    Attributes:
        at_bound: the likelihood still rises beyond the bound: the labels are separated perfectly (lower bound), or
            the scores tell nothing or the opposite (upper bound). The temperature is then no estimate.
        negative_log_likelihood: mean over pairs, in nats, at this temperature.
    """

    temperature: float
    at_bound: bool
    negative_log_likelihood: float

    @property
    def stored(self) -> float:
        """What goes with the model: 1, for none, where the pairs do not determine one (all right, or no signal)."""
        return 1.0 if self.at_bound else self.temperature


def calibration(
    differences: ArrayLike,
    chosen_probability: ArrayLike,
    groups: Groups,
    *,
    seed: int,
    bins: int = BINS,
    temperature: float = 1.0,
) -> Calibration:
    """All about the calibration of score differences; independent of how the pairs are oriented.

    At a difference of 0 neither response is ahead; both orientations count, which makes the label one half.

    Args:
        differences: `[P]`, P ≥ 1, score of chosen − score of rejected.
        chosen_probability: `[P]` in [0, 1], shares of votes where there are several.
        groups: of the pairs.
        seed: keys the floor.
        bins: of equal width over [½, 1]; fewer where there are less than `PAIRS_PER_BIN` pairs for each.
        temperature: positive; scores are divided by it.
    """
    delta, probability = check_pairs(differences, chosen_probability)
    if not len(delta):
        raise ValueError("calibration of no pairs")
    bins = max(min(bins, len(delta) // PAIRS_PER_BIN), 1)
    predicted = expit(np.abs(delta) / temperature)
    label = 0.5 + (probability - 0.5) * np.sign(delta)
    place = np.minimum(((2 * predicted - 1) * bins).astype(np.int64), bins - 1)
    residuals = (label - predicted)[:, None] * (place[:, None] == np.arange(bins)) / len(delta)
    ece = float(np.abs(residuals.sum(axis=0)).sum())
    drawn = _sampling_errors(residuals, groups, seed)
    mean = float(drawn.mean())
    quantile_95, lowest, highest = np.quantile(drawn, (0.95, (1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    counts = np.bincount(place, minlength=bins)
    confidence, frequency = (np.bincount(place, values, bins) for values in (predicted, label))
    right = expit(delta / temperature)
    return Calibration(
        ece=ece,
        floor=SamplingFloor(mean, quantile_95),
        excess=Estimate(ece - mean, ece - highest, ece - lowest),
        bins=tuple(
            ReliabilityBin(
                low=0.5 + number / bins / 2,
                high=0.5 + (number + 1) / bins / 2,
                count=int(count),
                confidence=float(confidence[number] / count) if count else None,
                frequency=float(frequency[number] / count) if count else None,
            )
            for number, count in enumerate(counts)
        ),
        temperature=float(temperature),
        negative_log_likelihood=negative_log_likelihood(delta, probability, temperature),
        brier=float(np.mean(probability * (1 - right) ** 2 + (1 - probability) * right**2)),
        count=len(delta),
    )


def _sampling_errors(residuals: NDArray[np.float64], groups: Groups, seed: int) -> NDArray[np.float64]:
    """`[S]` expected calibration errors of a calibrated model: Σ |z| with z normal, of the residuals' covariance.

    Args:
        residuals: `[P, B]`, (label − prediction) / P in the pair's bin. They are expected to be 0 in a calibrated
            model, so what their sums vary by is the sum of their products over related pairs.
    """
    covariance = groups.covariance(residuals)
    # Where it is no covariance (see `Groups.variance`), directions of negative variance are turned round.
    drawn = keyed_generator(seed, "ece-floor").multivariate_normal(
        np.zeros(len(covariance)), covariance, SIMULATIONS, method="eigh", check_valid="ignore"
    )
    return np.abs(drawn).sum(axis=1)


def negative_log_likelihood(differences: ArrayLike, chosen_probability: ArrayLike, temperature: float = 1.0) -> float:
    """Mean over pairs of −p log σ(Δ/T) − (1 − p) log σ(−Δ/T), in nats."""
    delta, probability = check_pairs(differences, chosen_probability)
    scaled = delta / temperature
    return float(-np.mean(probability * log_expit(scaled) + (1 - probability) * log_expit(-scaled)))


def fit_temperature(
    differences: ArrayLike,
    chosen_probability: ArrayLike,
    bounds: tuple[float, float] = TEMPERATURE_BOUNDS,
) -> TemperatureFit:
    """Temperature scaling (Guo et al. 2017, section 4.2): the T of the least negative log-likelihood.

    The likelihood is concave in the slope a = 1/T, so its derivative Σ Δ (σ(aΔ) − p) has one root or none; without
    one the result is the nearest bound.

    Args:
        bounds: of T, as multiples of the root mean square of the differences.
    """
    delta, probability = check_pairs(differences, chosen_probability)
    if not len(delta):
        raise ValueError("temperature of no pairs")

    def derivative(log_slope: float) -> float:
        return float(delta @ (expit(math.exp(log_slope) * delta) - probability))

    typical = float(np.sqrt(np.square(delta).mean())) or 1.0
    lowest, highest = (bound * typical for bound in bounds)
    flattest, steepest = -math.log(highest), -math.log(lowest)
    if derivative(flattest) >= 0:
        temperature, at_bound = highest, True
    elif derivative(steepest) <= 0:
        temperature, at_bound = lowest, True
    else:
        temperature, at_bound = math.exp(-brentq(derivative, flattest, steepest)), False
    return TemperatureFit(temperature, at_bound, negative_log_likelihood(delta, probability, temperature))
