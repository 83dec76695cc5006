"""The learners in one process, with the real DeepSpeed: a step is the same however it is cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.config.settings import LearnerSettings, PolicySettings
from rlhf_ray.data.text import TextExample
from rlhf_ray.models.loading import read_model_facts
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.deepspeed_engine import Rank, deepspeed_configuration
from rlhf_ray.roles.learner import TrainSpec
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from tests.making import (
    HIDDEN_SIZE,
    KL_COEFFICIENT,
    LOSS,
    SPEC,
    largest_difference,
    learner_settings,
    parameters_of,
    random_rollout,
    rounding,
    shard_of,
    weights_in,
)

TOTAL_STEPS = 20
ROLLOUTS = [random_rollout(index) for index in range(3)]


def policy_learner(model: str, rank: Rank, temperature: float = 1.0, **settings: Any) -> PolicyLearner:
    return PolicyLearner(
        PolicySettings(model=model, learner=learner_settings(**settings)), rank, TOTAL_STEPS, temperature
    )


def critic_learner(model: str, rank: Rank, **settings: Any) -> CriticLearner:
    return CriticLearner(model, learner_settings(**settings), rank, TOTAL_STEPS, seed=0)


def train_policy(learner: PolicyLearner, step: int = 0, **spec: int) -> PolicyReport:
    shards = [shard_of(rollout, column) for rollout, column in zip(ROLLOUTS, learner.logprobs(ROLLOUTS), strict=True)]
    cut = TrainSpec(**{"epochs": 1, "minibatches": 1, "micro_batch_tokens": 4096, "seed": 0, **spec})
    return learner.train(step, shards, SPEC, cut, LOSS, KL_COEFFICIENT)


def train_critic(learner: CriticLearner, **spec: int) -> CriticReport:
    shards = [shard_of(rollout, None) for rollout in ROLLOUTS]
    cut = TrainSpec(**{"epochs": 1, "minibatches": 1, "micro_batch_tokens": 4096, "seed": 0, **spec})
    return learner.train(0, shards, SPEC, cut, 0.2, KL_COEFFICIENT)


def trained(learner: Any) -> dict[str, torch.Tensor]:
    return parameters_of(learner._engine.unwrapped)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_policy_step_does_not_depend_on_the_micro_batches(policy_model: str, single_rank: Rank, zero_stage: int):
    results = []
    for tokens in (32, 4096):
        learner = policy_learner(policy_model, single_rank, zero_stage=zero_stage, micro_batch_tokens=tokens)
        before = trained(learner)
        report = train_policy(learner, micro_batch_tokens=tokens)
        results.append((report, trained(learner)))
        assert largest_difference(before, results[-1][1]) > 1e-4
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= 1e-6
    for name in ("loss", "entropy", "grad_norm", "clip_fraction"):
        assert getattr(small, name) == pytest.approx(getattr(large, name), abs=rounding(HIDDEN_SIZE)), name
    assert large.grad_norm > 0.01


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_offloaded_optimizer_steps_as_the_other_does(policy_model: str, single_rank: Rank, zero_stage: int):
    results = []
    for zero in ({}, {"offload_optimizer": {"device": "cpu"}}):
        learner = policy_learner(
            policy_model, single_rank, zero_stage=zero_stage, deepspeed={"zero_optimization": zero}
        )
        results.append(([train_policy(learner, step).grad_norm for step in range(2)], trained(learner)))
    (plain_norms, plain), (norms, offloaded) = results
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    assert largest_difference(plain, offloaded) <= 1e-6


def test_a_critic_step_does_not_depend_on_the_micro_batches(policy_model: str, single_rank: Rank):
    results = []
    for tokens in (32, 4096):
        learner = critic_learner(policy_model, single_rank, micro_batch_tokens=tokens)
        reports = [train_critic(learner, micro_batch_tokens=tokens) for _ in range(2)]
        results.append((reports, trained(learner)))
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= 1e-6
    for one, other in zip(small, large, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=rounding(HIDDEN_SIZE))
        assert one.grad_norm == pytest.approx(other.grad_norm, abs=rounding(HIDDEN_SIZE))
    assert large[1].loss < large[0].loss


def test_first_minibatch_has_ratio_one(policy_model: str, single_rank: Rank):
    """With micro-batches cut differently than for the old log-probs, and temperature."""
    learner = policy_learner(policy_model, single_rank, temperature=0.7, micro_batch_tokens=64)
    for step in range(2):
        report = train_policy(learner, step, epochs=2, minibatches=2, micro_batch_tokens=4096)
        assert report.first_ratio_error <= 1e-5
        assert abs(report.first_approx_kl) <= 1e-5
        assert report.approx_kl > 1e-5, "later minibatches must have moved, or this proves nothing"


def test_engine_logprobs_as_the_old_ones_give_a_ratio_other_than_one(policy_model: str, single_rank: Rank):
    learner = policy_learner(policy_model, single_rank)
    shards = [shard_of(rollout, None) for rollout in ROLLOUTS]
    report = learner.train(0, shards, SPEC, TrainSpec(1, 1, 4096, 0), LOSS, KL_COEFFICIENT)
    assert report.first_ratio_error > 1e-3
    assert report.mismatch_max_abs > 1e-2
    assert report.importance_weight_mean == pytest.approx(1.0)


def test_logprobs_of_a_rollout_do_not_depend_on_its_company(policy_model: str, single_rank: Rank):
    learner = policy_learner(policy_model, single_rank, micro_batch_tokens=50)
    together = learner.logprobs(ROLLOUTS)
    for rollout, column in zip(ROLLOUTS, together, strict=True):
        [alone] = learner.logprobs([rollout])
        assert column.data.shape == rollout.logprobs.shape
        np.testing.assert_allclose(column.data, alone.data, rtol=0, atol=rounding(HIDDEN_SIZE))


def test_a_critic_starts_at_zero(policy_model: str, single_rank: Rank):
    assert all(not column.data.any() for column in critic_learner(policy_model, single_rank).values(ROLLOUTS))


def test_failed_rewards_take_no_part(policy_model: str, single_rank: Rank):
    """The step without the failed sample's tokens counted is the step of the others."""
    results = []
    for garbage in (1.0, 50.0):
        learner = policy_learner(policy_model, single_rank)
        shards = []
        for rollout, column in zip(ROLLOUTS, learner.logprobs(ROLLOUTS), strict=True):
            shard = shard_of(rollout, column)
            scores = shard.rewards.scores.copy()
            scores[1] = np.nan
            rewards = replace(shard.rewards, scores=scores, failures=("", "too long", "", ""))
            assert shard.values is not None
            values = shard.values.data.copy()
            values[slice(*rollout.response_starts()[1:3])] = garbage
            shards.append(replace(shard, rewards=rewards, values=replace(shard.values, data=values)))
        report = learner.train(0, shards, SPEC, TrainSpec(1, 1, 4096, 0), LOSS, KL_COEFFICIENT)
        assert np.isfinite(report.loss)
        assert report.stats.num_valid == 9
        results.append(trained(learner))
    assert largest_difference(*results) == 0


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_policy_trains_exactly_its_top_layers(policy_model: str, single_rank: Rank, zero_stage: int):
    learner = policy_learner(policy_model, single_rank, trainable_top_layers=1, zero_stage=zero_stage)
    before = trained(learner)
    train_policy(learner)
    changed = {name for name, tensor in trained(learner).items() if not torch.equal(tensor, before[name])}
    top = ("language_model.model.layers.1.", "language_model.model.norm.", "language_model.lm_head.")
    assert changed == {name for name in before if name.startswith(top)}


def test_critic_trains_exactly_its_top_layers(policy_model: str, single_rank: Rank):
    learner = critic_learner(policy_model, single_rank, trainable_top_layers=1)
    before = trained(learner)
    for _ in range(2):  # The head is zero at first, and lets no gradient through.
        train_critic(learner)
    changed = {name for name, tensor in trained(learner).items() if not torch.equal(tensor, before[name])}
    top = ("token_classifier.model.layers.1.", "token_classifier.model.norm.", "token_classifier.score.")
    assert changed == {name for name in before if name.startswith(top)}


def test_supervised_step_does_not_depend_on_the_micro_batches(policy_model: str, single_rank: Rank):
    random = np.random.default_rng(0)
    examples = [
        TextExample(token_ids=random.integers(3, 300, 6 + 3 * index).astype(np.int32), learn_from=1 + index)
        for index in range(5)
    ]
    results = []
    for tokens in (16, 4096):
        learner = policy_learner(policy_model, single_rank, micro_batch_tokens=tokens)
        reports = [learner.train_text(examples) for _ in range(3)]
        results.append((reports, trained(learner)))
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= 2e-6
    assert small[0].loss == pytest.approx(large[0].loss, abs=rounding(HIDDEN_SIZE))
    assert small[0].tokens == sum(len(example.token_ids) - example.learn_from for example in examples)
    assert large[2].loss < large[0].loss


def test_gradients_are_clipped_and_the_norm_is_the_one_before(policy_model: str, single_rank: Rank):
    free = policy_learner(policy_model, single_rank, max_grad_norm=1e6, adam_epsilon=1.0)
    norm = train_policy(free).grad_norm
    clipped = policy_learner(policy_model, single_rank, max_grad_norm=norm / 10, adam_epsilon=1.0)
    before = trained(clipped)
    assert train_policy(clipped).grad_norm == pytest.approx(norm, rel=1e-4)
    # With a large ε, AdamW's first step is proportional to the gradient.
    moved = {name: trained(learner)[name] - before[name] for learner in (clipped,) for name in before}
    moved_freely = {name: trained(free)[name] - before[name] for name in before}
    name = "language_model.lm_head.weight"
    assert float(moved[name].norm() / moved_freely[name].norm()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_checkpoint_brings_everything_back(policy_model: str, single_rank: Rank, tmp_path: Path, zero_stage: int):
    settings = {"zero_stage": zero_stage, "warmup_steps": 4, "trainable_top_layers": 1}
    learner = policy_learner(policy_model, single_rank, **settings)
    train_policy(learner)
    learner.save_checkpoint(str(tmp_path))
    rates = [train_policy(learner, step=1).learning_rate]
    expected = trained(learner)
    resumed = policy_learner(policy_model, single_rank, **settings)
    resumed.load_checkpoint(str(tmp_path))
    rates.append(train_policy(resumed, step=1).learning_rate)
    assert largest_difference(trained(resumed), expected) == 0
    assert rates[0] == rates[1] < 1e-2


def test_a_missing_checkpoint_is_an_error(policy_model: str, single_rank: Rank, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        policy_learner(policy_model, single_rank).load_checkpoint(str(tmp_path))


def test_export_is_an_ordinary_model_directory(policy_model: str, single_rank: Rank, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    learner = policy_learner(policy_model, single_rank)
    train_policy(learner)
    learner.export(str(tmp_path / "policy"))
    read_model_facts(str(tmp_path / "policy"), "policy.model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    expected = {name.removeprefix("language_model."): tensor for name, tensor in trained(learner).items()}
    assert largest_difference(parameters_of(loaded), expected) == 0
    assert set(weights_in(tmp_path / "policy")) == set(weights_in(Path(policy_model)))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"


def test_weight_buckets_hold_every_weight(policy_model: str, single_rank: Rank):
    learner = policy_learner(policy_model, single_rank)
    train_policy(learner)
    found = {name: tensor for bucket in learner.weight_buckets(20_000) for name, tensor in bucket.tensors()}
    expected = {name.removeprefix("language_model."): tensor for name, tensor in trained(learner).items()}
    assert largest_difference(found, expected) == 0
    assert set(found) == set(weights_in(Path(policy_model)))


def test_bfloat16_keeps_master_weights(policy_model: str, single_rank: Rank):
    """Steps too small for bfloat16 add up."""
    learner = policy_learner(
        policy_model, single_rank, dtype="bfloat16", learning_rate=3e-5, adam_epsilon=1e-8, micro_batch_tokens=64
    )
    before = trained(learner)
    assert before["language_model.lm_head.weight"].dtype == torch.bfloat16
    for step in range(TOTAL_STEPS):
        train_policy(learner, step)
    moved = (trained(learner)["language_model.lm_head.weight"] - before["language_model.lm_head.weight"]).abs()
    assert float(moved.float().mean()) > 3e-5


def test_settings_reach_deepspeed_and_can_be_overridden():
    settings = LearnerSettings(
        zero_stage=2,
        max_grad_norm=0.5,
        deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "steps_per_print": 7},
    )
    configuration = deepspeed_configuration(settings, "bfloat16")
    assert configuration["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert configuration["gradient_clipping"] == 0.5
    assert configuration["bf16"] == {"enabled": True}
    assert configuration["steps_per_print"] == 7
