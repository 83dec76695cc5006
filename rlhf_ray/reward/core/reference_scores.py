"""What a reward model's scores looked like when it was judged: the reference that live traffic is compared with.

`reference_scores.json` lies beside the weights and is no part of the model's version. A distribution is kept as its
cumulative shares at a few hundred points, taken where the quantiles are. At these points the shares are exact, ties or
not, so a comparison made there has no error of interpolation.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.reward.core.beside_weights import BesideWeights

REFERENCE_NAME = "reference_scores.json"
_QUANTILES = 201

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Distribution(BaseModel):
    """A distribution by its cumulative shares.

    Attributes:
        points: increasing, in the unit of the values. The last is the largest value.
        shares: of the values that are at most each point, in [0, 1] and exact.
        mean, std: of the values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[Finite, ...] = Field(min_length=1)
    shares: tuple[Finite, ...]
    mean: Finite
    std: Annotated[Finite, Field(ge=0)]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Distribution:
        """The distribution of values `[n]`, all finite.

        A value so frequent that several quantiles meet at it (texts cut at the longest length) also gets a point just
        below it: what is at it and what comes before it are told apart.
        """
        ordered = np.sort(values)
        # The empirical distribution function inverted: every quantile is one of the values.
        quantiles = np.quantile(ordered, np.linspace(0, 1, _QUANTILES), method="inverted_cdf")
        points, repeats = np.unique(quantiles, return_counts=True)
        points = np.union1d(points, np.nextafter(points[repeats > 1], -np.inf))
        shares = np.searchsorted(ordered, points, side="right") / len(ordered)
        return cls(
            points=tuple(points.tolist()),
            shares=tuple(shares.tolist()),
            mean=float(ordered.mean()),
            std=float(ordered.std()),
        )

    @model_validator(mode="after")
    def _cumulative(self) -> Distribution:
        if len(self.points) != len(self.shares):
            raise ValueError(f"{len(self.points)} points and {len(self.shares)} shares do not go together")
        if (np.diff(self.points) <= 0).any():
            raise ValueError("the points do not increase")
        if self.shares[0] < 0 or self.shares[-1] != 1 or (np.diff(self.shares) < 0).any():
            raise ValueError("the shares do not rise to 1")
        return self


class ReferenceScores(BesideWeights):
    """Scores and lengths of the texts that a reward model was judged on.

    Attributes:
        version: of the model that gave the scores.
        texts: that have a score.
        failed_texts: that have none.
        score: on the model's raw scale.
        length: in tokens, as scored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    FILE_NAME = REFERENCE_NAME
    MEANING = "a file of reference scores"

    version: str
    texts: int = Field(gt=0)
    failed_texts: int = Field(ge=0)
    score: Distribution
    length: Distribution

    @classmethod
    def of(cls, scores: ArrayLike, num_tokens: ArrayLike, version: str) -> ReferenceScores:
        """The reference of different texts that are like those the model is for.

        Args:
            scores: `[n]` raw scores, NaN where a text has none.
            num_tokens: `[n]`.

        Raises:
            ValueError: no text has a score, or the shapes differ.
        """
        values, lengths = np.asarray(scores, dtype=np.float64), np.asarray(num_tokens, dtype=np.float64)
        if values.ndim != 1 or values.shape != lengths.shape:
            raise ValueError(f"scores and num_tokens have shapes {values.shape} and {lengths.shape}, not n")
        good = np.isfinite(values)
        if not good.any():
            raise ValueError("no text has a score")
        return cls(
            version=version,
            texts=int(good.sum()),
            failed_texts=int((~good).sum()),
            score=Distribution.of(values[good]),
            length=Distribution.of(lengths[good]),
        )
