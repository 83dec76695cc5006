"""Scores of several sources: asked for by the driver, added up where they are used, and told by their headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.reward.core.protocol import Conversation, Scorer
from rlhf_ray.rollout import RewardColumn, RewardHeader, Rollout, weighted_sum
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, Deferred, Stored


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
    def num_failures(self) -> int:
        return sum(len(header.failed) for header in self.shards)

    @property
    def num_scored(self) -> int:
        return sum(header.num_scored for header in self.shards)

    @property
    def failed_fraction(self) -> float:
        """Share of the samples that it has no score for."""
        return self.num_failures / (self.num_failures + self.num_scored)

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
        return sum(totals) / max(self.num_scored, 1) if len(totals) == len(self.shards) else None

    def metrics(self) -> dict[str, float | int | None]:
        """Of this source, under its name."""
        count = self.num_scored
        mean = sum(header.score_sum for header in self.shards) / count if count else None
        square = sum(header.score_square_sum for header in self.shards) / count if count else None
        values = {
            "mean": mean,
            "std": None if mean is None or square is None else math.sqrt(max(square - mean**2, 0.0)),
            "failed_fraction": self.failed_fraction,
            "time_s": sum(header.time_s for header in self.shards) / len(self.shards),
        }
        return {f"reward/{self.source.name}/{name}": value for name, value in values.items()}


def num_failed(sources: Sequence[SourceHeaders]) -> int:
    """Samples that have no reward; one that several sources failed on counts once."""
    counted = [each for each in sources if each.source.weight]
    shards = zip(*(each.shards for each in counted), strict=True)
    return sum(len({place for header in shard for place in header.failed}) for shard in shards)


def all_causes(sources: Sequence[SourceHeaders]) -> dict[str, int]:
    """How often each cause occurred; where there are several sources, each cause names its own."""
    if len(sources) == 1:
        return sources[0].failure_causes
    return {f"{each.source.name}: {cause}": count for each in sources for cause, count in each.failure_causes.items()}
