"""What the driver makes of several sources: references to the weighted sum, and figures from headers."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.ppo.scoring import ShardRewards, SourceHeaders, all_causes, rewards_of
from rlhf_ray.rollout import RewardColumn
from rlhf_ray.runtime.answers import AllOf, Answer, Assembly, Stored
from rlhf_ray.tracking.metrics import check_known

NAN = float("nan")


def source(name: str, **chosen: Any) -> RewardSettings:
    return RewardSettings(name=name, function="my:f", **chosen)


def column(scores: list[float], cause: str = "why", **more: Any) -> RewardColumn:
    return RewardColumn(np.array(scores), tuple(cause if np.isnan(score) else "" for score in scores), "v", **more)


def headers(settings: RewardSettings, *columns: RewardColumn) -> SourceHeaders:
    return SourceHeaders(settings, tuple(each.header() for each in columns))


def stored(name: str) -> Stored[RewardColumn]:
    return Stored(*(Answer(f"{name}-{part}", name, "?", "score") for part in ("data", "header")))  # type: ignore[arg-type]


def test_one_source_of_weight_1_is_the_reward_itself():
    only = ShardRewards((source("a"), source("b", weight=0.0)), (stored("a"), stored("b")))
    assert only.data == stored("a").data
    assert only.headers == [stored("a").header, stored("b").header]


def test_several_sources_are_added_where_they_are_used():
    sources = (source("a", weight=0.5), source("b", weight=0.0), source("c", weight=2.0))
    deferred = ShardRewards(sources, tuple(stored(each.name) for each in sources)).data
    assert isinstance(deferred, Assembly)
    assert deferred.fields["columns"] == AllOf((stored("a").data, stored("c").data))
    columns = [column([1.0, NAN]), column([3.0, 4.0])]
    total = deferred.make(**{**deferred.fields, "columns": columns})
    assert total.scores[0] == 0.5 * 1.0 + 2.0 * 3.0
    assert total.failures == ("", "a: why")
    assert isinstance(ShardRewards((source("a", weight=2.0),), (stored("a"),)).data, Assembly)


def test_headers_are_sorted_by_source():
    sources = (source("a"), source("b"))
    rewards = [ShardRewards(sources, ()) for _ in range(2)]
    each = [column([float(number)]).header() for number in range(4)]
    one, other = SourceHeaders.by_source(rewards, each)
    assert (one.source.name, one.shards) == ("a", (each[0], each[2]))
    assert (other.source.name, other.shards) == ("b", (each[1], each[3]))


def test_figures_of_a_source_are_those_of_its_scores():
    random = np.random.default_rng(0)
    scores = random.normal(3.0, 2.0, 50)
    told = headers(
        source("exact"),
        column([*scores[:20], NAN], time_s=1.0),
        column([*scores[20:], NAN, NAN], time_s=2.0),
    ).metrics()
    check_known("ppo", told)
    assert told["reward/exact/mean"] == pytest.approx(scores.mean(), abs=1e-12)
    assert told["reward/exact/std"] == pytest.approx(scores.std(), abs=1e-12)
    assert told["reward/exact/failed_fraction"] == 3 / 53
    assert told["reward/exact/time_s"] == 1.5


def test_a_source_without_a_score_has_no_mean():
    told = headers(source("a"), column([NAN, NAN])).metrics()
    assert (told["reward/a/mean"], told["reward/a/std"], told["reward/a/failed_fraction"]) == (None, None, 1.0)


def test_a_sample_that_several_sources_failed_on_counts_once_and_one_that_is_only_logged_not_at_all():
    one = headers(source("a"), column([NAN, 1.0, 1.0]), column([1.0]))
    other = headers(source("b"), column([NAN, NAN, 1.0]), column([NAN], "else"))
    watched = headers(source("c", weight=0.0), column([NAN, NAN, NAN]), column([1.0]))
    np.testing.assert_array_equal(rewards_of([one, other, watched]), [NAN, NAN, 2.0, NAN])
    assert all_causes([one, other]) == {"a: why": 1, "b: why": 2, "b: else": 1}
    assert all_causes([other]) == {"why": 2, "else": 1}
