"""Who is asked for which shard."""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.ppo.scoring import SourceGroup
from rlhf_ray.ppo.step import refer, score, shards_of_groups
from rlhf_ray.roles.generator import Generator
from rlhf_ray.rollout import RewardColumn
from rlhf_ray.runtime.answers import AllOf


@dataclass
class Asked:
    """Stands in for the references' actor group, and notes what each of them is asked for."""

    replicas: int
    shards: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.replicas

    def of(self, index: int) -> Any:
        replica = index % self.replicas

        def keep(method: Any, shard: int, trunk: None) -> int:
            self.shards.append((replica, shard))
            return shard

        return SimpleNamespace(keep=keep)


@pytest.mark.parametrize(("is_sharded", "asked"), [(True, {0: 2, 1: 2, 2: 2}), (False, {0: 2, 1: 1, 2: 1})])
def test_the_ranks_of_a_sharded_reference_are_all_asked_as_often(is_sharded: bool, asked: dict[int, int]):
    """Four held-out shards on three ranks: a rank that is not asked would leave the others waiting in their pass."""
    references = Asked(3)
    shards: Any = [SimpleNamespace(rollout=SimpleNamespace(data=index)) for index in range(4)]
    roles: Any = SimpleNamespace(has_reference=True, references=references, reference_is_sharded=is_sharded)
    found: Any = refer(roles, shards)
    assert found == [0, 1, 2, 3]
    assert Counter(replica for replica, _ in references.shards) == asked
    assert references.shards[:4] == [(0, 0), (1, 1), (2, 2), (0, 3)]


@pytest.mark.parametrize(("sharded", "asked"), [(True, {0: 2, 1: 2, 2: 2}), (False, {0: 2, 1: 1, 2: 1})])
def test_the_ranks_of_a_sharded_reward_model_are_all_asked_as_often(sharded: bool, asked: dict[int, int]):
    scorers: Any = Asked(3)
    source = RewardSettings(model="unread", sharded=sharded, replicas=3)
    shards: Any = [SimpleNamespace(rollout=SimpleNamespace(data=index), prompts={}) for index in range(4)]
    roles: Any = SimpleNamespace(sources=(SourceGroup(source, scorers),))
    rewards = score(roles, shards)
    assert [each.columns for each in rewards] == [(0,), (1,), (2,), (3,)]
    assert Counter(replica for replica, _ in scorers.shards) == asked
    assert [shard for _, shard in scorers.shards[4:]] == [3] * (len(scorers.shards) - 4)


def test_chosen_groups_fill_shards_of_the_usual_size():
    """Eight groups of three samples in four shards, of which six are chosen: three shards, one after another."""
    asked: list[tuple[int, Any, Any, Any]] = []

    def generator(index: int) -> Any:
        def keep(method: Any, rows: Any, samples: Any) -> Any:
            asked.append((index, method, rows, samples))
            return f"gathered {index}"

        return SimpleNamespace(beside=SimpleNamespace(keep=keep))

    roles: Any = SimpleNamespace(generators=SimpleNamespace(of=generator), references=None)
    plan = SimpleNamespace(samples_per_prompt=3)
    shards: Any = [SimpleNamespace(plan=plan, rollout=SimpleNamespace(data=f"rows {index}")) for index in range(4)]
    rewards: Any = [SimpleNamespace(data=f"rewards {index}") for index in range(4)]
    found = shards_of_groups(roles, shards, rewards, (0, 1, 2, 4, 5, 7), 2)
    assert [index for index, *_ in asked] == [0, 1, 2]
    assert all(method is Generator.gather for _, method, *_ in asked)
    assert [(rows, samples) for *_, rows, samples in asked] == [
        (AllOf(("rows 0",)), [[0, 1, 2, 3, 4, 5]]),
        (AllOf(("rows 1", "rows 2")), [[0, 1, 2], [0, 1, 2]]),
        (AllOf(("rows 2", "rows 3")), [[3, 4, 5], [3, 4, 5]]),
    ]
    assert [shard.rollout for shard in found] == ["gathered 0", "gathered 1", "gathered 2"]
    for shard, (*_, samples), names in zip(found, asked, [(0,), (1, 2), (2, 3)], strict=True):
        column: Any = shard.rewards
        assert column.make == RewardColumn.gathered
        assert column.fields == {"columns": AllOf(tuple(f"rewards {name}" for name in names)), "samples": samples}
