"""Sums over the samples of flat token-level data, and moments over the ranks of a learner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

AllReduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a small float64 CPU vector over the learner's ranks, all of which make the same calls in the same order."""


def single_rank(sums: torch.Tensor) -> torch.Tensor:
    """The `AllReduce` of a learner with one rank: the sums as they are."""
    return sums


def segment_ids(lengths: torch.Tensor) -> torch.Tensor:
    """`[R]` int64: which of the `B` samples each token belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[B]` sum of the floating-point `values` (`[R]`) of each sample, in their type."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def segment_counts(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[B]` int64: how many tokens of each sample are true in `mask` (`[R]` bool)."""
    return segment_sum(mask.double(), lengths).long()


def last_index(lengths: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`[B]` int64: where each sample's last token is in the flat data.

    Args:
        lengths: `[B]`.
        mask: `[R]` bool, true for the tokens that count, at least one in each sample; None: all.
    """
    if mask is None:
        return torch.cumsum(lengths, 0) - 1
    places = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    return torch.full_like(lengths, -1).scatter_reduce(0, segment_ids(lengths), places, "amax")


def group_sum(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """`[B]` sum of `values` (`[B]`) over the group of each sample; the samples of a group need not be neighbours."""
    groups, index = torch.unique(group_ids, return_inverse=True)
    return torch.zeros(len(groups), dtype=values.dtype, device=values.device).index_add(0, index, values)[index]


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares in float64; they add up over shards and ranks."""

    count: float
    sum: float
    square_sum: float

    @classmethod
    def of(cls, values: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
        """Moments of `values`, or of those where `mask` (bool, same shape) is true; the others may be anything."""
        chosen = (values if mask is None else values[mask]).detach().double()
        return cls(float(chosen.numel()), float(chosen.sum()), float(chosen.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.square_sum + other.square_sum)

    def reduced(self, all_reduce: AllReduce) -> Moments:
        """The same over all ranks; one call of `all_reduce`."""
        return Moments(*all_reduce(torch.tensor(self.vector(), dtype=torch.float64)).tolist())

    def vector(self) -> list[float]:
        """`[count, sum, square_sum]`, in the order of the constructor."""
        return [self.count, self.sum, self.square_sum]

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.sum / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Population variance (divided by the count); NaN without values."""
        return max(self.square_sum / self.count - self.mean**2, 0.0) if self.count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation; NaN without values."""
        return math.sqrt(self.variance)
