"""Who is asked for which shard."""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.ppo.step import refer


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
