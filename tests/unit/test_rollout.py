"""What a rollout and its columns promise, and that the driver cannot read them."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.rollout import (
    RewardColumn,
    Rollout,
    RolloutFetchedByDriver,
    TokenColumn,
    offsets,
    refuse_rollouts_in_this_process,
    weighted_sum,
)
from tests.making import random_rollout, rollout_of


def test_samples_lie_one_after_another():
    rollout = rollout_of([[5, 6], [7]], [[8], [9, 10, 11]], first_prompt_id=4)
    assert rollout.tokens.tolist() == [5, 6, 8, 7, 9, 10, 11]
    assert [rollout.sample_tokens(index).tolist() for index in range(2)] == [[5, 6, 8], [7, 9, 10, 11]]
    assert rollout.token_starts().tolist() == [0, 3, 7]
    assert rollout.response_starts().tolist() == [0, 1, 4]
    assert offsets([]).tolist() == [0]


@pytest.mark.parametrize(
    "name", ["tokens", "response_lengths", "logprobs", "policy_versions", "finish_reasons", "sample_ids", "prompt_ids"]
)
def test_arrays_of_the_wrong_length_are_refused(name: str):
    rollout = random_rollout(0)
    with pytest.raises(ValueError, match=r"Rollout\.\w+ has shape"):
        replace(rollout, **{name: np.append(getattr(rollout, name), 1).astype(getattr(rollout, name).dtype)})


def test_an_empty_response_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        rollout_of([[5], [6]], [[7], []])


def test_rows_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        random_rollout(0).tokens = np.zeros(1, dtype=np.int32)  # type: ignore[misc]


def test_header_counts():
    rollout = rollout_of([[5, 6], [7]], [[8], [9, 10]], finished=False)
    rollout = replace(rollout, policy_versions=np.array([3, 4, 4], dtype=np.int32))
    header = rollout.header()
    assert (header.num_samples, header.num_response_tokens) == (2, 3)
    assert (header.version_min, header.version_max, header.version_sum) == (3, 4, 11)


def test_a_loss_mask_is_in_header_and_digest_and_versions_are_those_of_sampled_tokens():
    plain = rollout_of([[5, 6], [7]], [[8], [9, 10, 11]])
    plain = replace(plain, policy_versions=np.array([3, 9, 4, 0], dtype=np.int32))
    masked = replace(plain, loss_mask=np.array([True, False, True, False]))
    header = masked.header()
    assert (header.num_response_tokens, header.num_sampled_tokens) == (4, 2)
    assert (header.version_min, header.version_max, header.version_sum) == (3, 4, 7)
    assert plain.header().num_sampled_tokens == 4
    assert plain.sampled().all()
    other = replace(plain, loss_mask=np.array([True, True, True, False]))
    assert len({each.digest() for each in (plain, masked, other)}) == 3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3, dtype=bool), r"loss_mask has shape \(3,\)"),
        (np.ones(4, dtype=np.int8), "loss_mask is int8, expected bool"),
        (np.array([False, True, True, True]), "at least one token of every response"),
        (np.array([True, False, False, False]), "at least one token of every response"),
    ],
)
def test_a_loss_mask_that_cannot_be_is_refused(mask: Any, message: str):
    with pytest.raises(ValueError, match=message):
        replace(rollout_of([[5, 6], [7]], [[8], [9, 10, 11]]), loss_mask=mask)


def test_samples_of_several_shards_are_gathered_as_they_are():
    shards = [random_rollout(index) for index in range(3)]
    mask = np.arange(len(shards[2].logprobs)) % 3 != 1
    mask[shards[2].response_starts()[:-1]] = True
    shards[2] = replace(shards[2], loss_mask=mask)
    places = ([2, 3], [0], [1, 0, 3])
    gathered = Rollout.gathered(shards, places)
    taken = [(shard, place) for shard, chosen in zip(shards, places, strict=True) for place in chosen]
    assert gathered.num_samples == len(taken)
    starts = gathered.response_starts()
    for own, (shard, place) in enumerate(taken):
        response = slice(starts[own], starts[own + 1])
        first, last = shard.response_starts()[place : place + 2]
        assert gathered.sample_tokens(own).tolist() == shard.sample_tokens(place).tolist()
        for name in ("logprobs", "policy_versions"):
            assert getattr(gathered, name)[response].tolist() == getattr(shard, name)[first:last].tolist()
        assert gathered.sampled()[response].tolist() == shard.sampled()[first:last].tolist()
        for name in ("prompt_lengths", "response_lengths", "finish_reasons", "sample_ids", "prompt_ids"):
            assert getattr(gathered, name)[own] == getattr(shard, name)[place]
    for name, array in vars(gathered).items():
        assert array.dtype == getattr(shards[2], name).dtype
    assert Rollout.gathered(shards[:1], [range(4)]).digest() == shards[0].digest()


def test_rewards_are_gathered_with_their_failures():
    nan = float("nan")
    columns = [
        RewardColumn(np.array([1.0, nan, 3.0]), ("", "slow", ""), "v1"),
        RewardColumn(np.array([4.0, 5.0]), ("", ""), "v1"),
    ]
    gathered = RewardColumn.gathered(columns, [[1, 2], [0]])
    np.testing.assert_array_equal(gathered.scores, [nan, 3.0, 4.0])
    assert (gathered.failures, gathered.version) == (("slow", "", ""), "v1")


def test_reward_header_counts_failures_by_cause():
    nan = float("nan")
    column = RewardColumn(np.array([1.0, nan, 3.0, nan]), ("", "slow", "", "slow"), "v1", num_truncated=1)
    header = column.header()
    np.testing.assert_array_equal(header.scores, [1.0, nan, 3.0, nan])
    assert header.num_truncated == 1
    assert header.failure_causes == {"slow": 2}


def test_reward_header_says_where_scores_failed_and_sums_up_rare_causes():
    causes = ("", *(f"cause {number}" for number in range(10)), "cause 7", "cause 9")
    column = RewardColumn(np.where([not cause for cause in causes], 1.0, np.nan), causes, "v1", time_s=0.5)
    header = column.header()
    assert np.flatnonzero(np.isnan(header.scores)).tolist() == list(range(1, 13))
    assert header.time_s == 0.5
    assert len(header.failure_causes) == 9
    assert (header.failure_causes["cause 7"], header.failure_causes["cause 9"]) == (2, 2)
    assert header.failure_causes["other causes"] == 2
    assert sum(header.failure_causes.values()) == 12


def test_scores_of_several_sources_add_up_by_their_weights():
    nan = float("nan")
    one = RewardColumn(np.array([1.0, 2.0, nan, nan]), ("", "", "late", "late"), "v1", num_truncated=2)
    other = RewardColumn(np.array([-4.0, nan, 8.0, nan]), ("", "odd", "", "odd"), "v2")
    total = weighted_sum([one, other], ["a", "b"], [0.5, -0.25])
    assert total.scores[0] == 0.5 * 1.0 + -0.25 * -4.0
    assert np.isnan(total.scores[1:]).all()
    assert total.failures == ("", "b: odd", "a: late", "a: late; b: odd")
    assert (total.version, total.num_truncated) == ("a v1, b v2", 2)


def test_a_weighted_sum_beyond_floats_is_a_failure():
    column = RewardColumn(np.array([1e308, 1.0]), ("", ""), "v1")
    assert weighted_sum([column], ["a"], [10.0]).failures == ("the weighted sum is inf", "")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_needs_a_cause(score: float):
    with pytest.raises(ValueError, match="not finite"):
        RewardColumn(np.array([1.0, score]), ("", ""), "v1")
    with pytest.raises(ValueError, match="2 scores but 1"):
        RewardColumn(np.array([1.0, 2.0]), ("",), "v1")


MADE: list[Callable[[], Any]] = [
    lambda: random_rollout(0),
    lambda: TokenColumn(np.ones(3, dtype=np.float32)),
    lambda: RewardColumn(np.ones(2), ("", ""), "v1"),
]


@pytest.mark.parametrize("make", MADE, ids=["rollout", "tokens", "rewards"])
def test_a_process_can_refuse_to_read_what_it_only_refers_to(make: Callable[[], Any]):
    shipped = pickle.dumps(make())
    refuse_rollouts_in_this_process()
    try:
        with pytest.raises(RolloutFetchedByDriver, match=type(make()).__name__):
            pickle.loads(shipped)
        header = pickle.loads(pickle.dumps(random_rollout(0).header()))
        assert header == random_rollout(0).header(), "headers are for the driver"
    finally:
        refuse_rollouts_in_this_process(False)
    assert pickle.dumps(pickle.loads(shipped)) == shipped


def test_a_shipped_rollout_is_the_same():
    rollout = random_rollout(3)
    arrived: Rollout = pickle.loads(pickle.dumps(rollout))
    for name, value in vars(rollout).items():
        assert np.array_equal(getattr(arrived, name), value)
