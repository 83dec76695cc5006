"""Learners that begin behind the frozen layers do what they would do from the first layer on."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import CriticSettings, PolicySettings, PPOConfig, ReferenceSettings
from rlhf_ray.models.trunk import column_of, states_of
from rlhf_ray.ppo.inputs import trunk_sharers
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.roles.reference import Reference
from tests.conftest import REPOSITORY
from tests.making import (
    ALGORITHM,
    HIDDEN_SIZE,
    KL_COEFFICIENT,
    largest_difference,
    learner_settings,
    parameters_of,
    random_rollout,
    rounding,
    shard_of,
)

ROLLOUTS = [random_rollout(index) for index in range(2)]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_columns_and_updates_are_those_of_whole_passes(policy_model: str, single_rank: Rank, zero_stage: int):
    settings = learner_settings(trainable_top_layers=1, zero_stage=zero_stage, micro_batch_tokens=40)
    policy_settings = PolicySettings(model=policy_model, learner=settings)
    critic_settings = CriticSettings(learner=settings)
    reference = Reference(policy_model, ReferenceSettings(dtype="float32", micro_batch_tokens=30), 1.0, 1)
    trunks = [reference.trunk(rollout) for rollout in ROLLOUTS]
    for rollout, trunk in zip(ROLLOUTS, trunks, strict=True):
        assert trunk.data.shape == (len(rollout.tokens), HIDDEN_SIZE)
        np.testing.assert_allclose(
            reference.logprobs(rollout, trunk).data, reference.logprobs(rollout).data, atol=rounding(HIDDEN_SIZE)
        )
    results = []
    for given in (trunks, [None, None]):
        shares = given[0] is not None
        policy = PolicyLearner(policy_settings, ALGORITHM, single_rank, total_steps=9, shares_trunk=shares)
        critic = CriticLearner(
            critic_settings,
            policy_model,
            ALGORITHM,
            single_rank,
            total_steps=9,
            max_response_tokens=16,
            seed=0,
            shares_trunk=shares,
        )
        shards = [
            replace(
                shard_of(rollout, policy.logprobs(rollout, trunk), critic.values(rollout, trunk)),
                trunk=trunk,
            )
            for rollout, trunk in zip(ROLLOUTS, given, strict=True)
        ]
        reports = policy.train(0, shards, KL_COEFFICIENT), critic.train(0, shards, KL_COEFFICIENT)
        values = critic.values(ROLLOUTS[0], given[0]).data
        weights = parameters_of(policy._engine.unwrapped) if zero_stage == 1 else {}
        results.append((reports, values, weights))
    (short, short_values, short_weights), (whole, whole_values, whole_weights) = results
    assert short[0].first_ratio_error < 1e-6
    assert short[0].loss == pytest.approx(whole[0].loss, abs=1e-5)
    assert short[1].loss == pytest.approx(whole[1].loss, abs=1e-5)
    assert whole_values.any()
    np.testing.assert_allclose(short_values, whole_values, atol=1e-5)
    if zero_stage == 1:
        assert largest_difference(short_weights, whole_weights) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_come_out_of_their_column_as_they_went_in(dtype: str):
    import torch

    states = torch.randn(5, 8, dtype=getattr(torch, dtype))
    column = column_of(states)
    column.data.flags.writeable = False
    assert column.header() == 5
    assert torch.equal(states_of(column), states)


BOTH = ("policy.learner.trainable_top_layers=1", "critic.learner.trainable_top_layers=1")


@pytest.mark.parametrize(
    ("overrides", "sharers"),
    [
        (BOTH, {"policy", "critic"}),
        ((*BOTH, "critic.model=other"), {"policy"}),
        ((*BOTH, "critic.learner.dtype=bfloat16"), {"policy"}),
        (BOTH[:1], {"policy"}),
        (BOTH[1:], set()),
        ((*BOTH, "reference.model=other"), set()),
        ((*BOTH, "reference.dtype=bfloat16"), set()),
        (("policy.learner.trainable_top_layers=2", "critic.learner.trainable_top_layers=2"), set()),
    ],
)
def test_only_the_same_layers_in_the_same_type_are_shared(overrides: tuple[str, ...], sharers: set[str]):
    config = load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", overrides)
    assert trunk_sharers(config, num_layers=2) == sharers
