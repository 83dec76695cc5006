"""Scores of several sources: asked for by the driver, added up where they are used, and told by their headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.reward.core.protocol import Conversation, Scorer
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.roles.frozen_engine import FrozenEngine
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import RewardColumn, RewardHeader, Rollout, weighted_scores, weighted_sum
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, Deferred, Stored


def rank_scorer(source: RewardSource, policy_model: str, rank: Rank) -> Scorer:
    """A scorer of a model that is spread over all scorers of its source."""

    def place(build: Callable[[], Any], dtype: str) -> FrozenEngine:
        return FrozenEngine(build, rank, source.settings.gpus > 0, dtype)

    return source.constructor(policy_model, place)()


@dataclass(frozen=True)
class SourceGroup:
    """One source of rewards and the actors that score for it."""

    settings: RewardSettings
    scorers: ActorGroup[Scorer]


@dataclass(frozen=True)
class ShardRewards:
    """What each source says of one shard.

    Attributes:
        sources: in the order of the configuration.
        columns: of each source.
    """

    sources: tuple[RewardSettings, ...]
    columns: tuple[Stored[RewardColumn], ...]

    @classmethod
    def ask(
        cls, groups: Sequence[SourceGroup], index: int, rows: Answer[Rollout], prompts: dict[int, Conversation]
    ) -> ShardRewards:
        """Have a shard scored by every source at the same time.

        Args:
            index: of the shard in its step, which says whose turn it is in each group.
        """
        columns = [group.scorers.of(index).keep(Scorer.score, rows, prompts) for group in groups]
        return cls(tuple(group.settings for group in groups), tuple(columns))

    @property
    def data(self) -> Deferred[RewardColumn]:
        """The reward: the weighted sum, made in the process that uses it."""
        counted = [
            (source, column.data) for source, column in zip(self.sources, self.columns, strict=True) if source.weight
        ]
        if len(counted) == 1 and counted[0][0].weight == 1:
            return counted[0][1]
        return Assembly(
            weighted_sum,
            {
                "columns": AllOf(tuple(column for _, column in counted)),
                "names": [source.name for source, _ in counted],
                "weights": [source.weight for source, _ in counted],
            },
        )

    @property
    def headers(self) -> list[Answer[RewardHeader]]:
        """Of each source."""
        return [column.header for column in self.columns]


@dataclass(frozen=True)
class SourceHeaders:
    """What the driver knows of one source's scores in one step.

    Attributes:
        source: its settings.
        shards: headers, in the order of the shards.
    """

    source: RewardSettings
    shards: tuple[RewardHeader, ...]

    @classmethod
    def by_source(cls, rewards: Sequence[ShardRewards], headers: Sequence[RewardHeader]) -> tuple[SourceHeaders, ...]:
        """Sort the headers of a step.

        Args:
            rewards: of every shard.
            headers: of every shard, all sources of each together.
        """
        sources = rewards[0].sources
        return tuple(cls(source, tuple(headers[place :: len(sources)])) for place, source in enumerate(sources))

    @property
    def scores(self) -> NDArray[np.float64]:
        """`[B]` of all shards, NaN where there is none."""
        return np.concatenate([header.scores for header in self.shards])

    @property
    def num_failures(self) -> int:
        return int(np.isnan(self.scores).sum())

    @property
    def failed_fraction(self) -> float:
        """Share of the samples that it has no score for."""
        return self.num_failures / len(self.scores)

    @property
    def failure_causes(self) -> dict[str, int]:
        """How often each cause occurred."""
        causes: Counter[str] = Counter()
        for header in self.shards:
            causes.update(header.failure_causes)
        return dict(causes)

    @property
    def disagreement(self) -> float | None:
        """Mean standard deviation over the members of an ensemble; None where there is none."""
        totals = [header.disagreement_sum for header in self.shards if header.disagreement_sum is not None]
        scores = self.scores
        num_scored = len(scores) - self.num_failures
        return sum(totals) / max(num_scored, 1) if len(totals) == len(self.shards) else None

    def metrics(self) -> dict[str, float | int | None]:
        """Of this source, under its name."""
        scores = self.scores
        mean, std = mean_and_std(scores)
        values = {
            "mean": mean,
            "std": std,
            "failed_fraction": self.failed_fraction,
            "time_s": sum(header.time_s for header in self.shards) / len(self.shards),
        }
        return {f"reward/{self.source.name}/{name}": value for name, value in values.items()}


def rewards_of(sources: Sequence[SourceHeaders]) -> NDArray[np.float64]:
    """`[B]` a step's rewards, the weighted sums that `ShardRewards.data` is made of; NaN where there is none."""
    counted = [each for each in sources if each.source.weight]
    total = weighted_scores([each.scores for each in counted], [each.source.weight for each in counted])
    return np.where(np.isfinite(total), total, np.nan)


def mean_and_std(scores: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Mean and population standard deviation of those that are there; None where there are none.

    Args:
        scores: `[B]`, NaN where there is none.
    """
    found = scores[~np.isnan(scores)]
    return (float(found.mean()), float(found.std())) if len(found) else (None, None)


def all_causes(sources: Sequence[SourceHeaders]) -> dict[str, int]:
    """How often each cause occurred; where there are several sources, each cause names its own."""
    if len(sources) == 1:
        return sources[0].failure_causes
    return {f"{each.source.name}: {cause}": count for each in sources for cause, count in each.failure_causes.items()}
