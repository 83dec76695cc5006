"""The learners in one process, with the real DeepSpeed: a step is the same however it is cut."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf_ray.config.algorithm import AlgorithmSettings, ImportanceSettings, KLSettings
from rlhf_ray.config.settings import CriticSettings, LearnerSettings, PolicySettings
from rlhf_ray.data.text import TextExample
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models import token_loss
from rlhf_ray.models.loading import read_model_facts
from rlhf_ray.models.packing import RolloutRows
from rlhf_ray.ppo.export import export_policy
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, deepspeed_configuration
from rlhf_ray.roles.frozen_engine import FrozenEngine
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport, build_policy
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.roles.relayout import Layout, SavedLearner
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, RewardColumn, Rollout, SampleUse, TokenColumn
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
    weights_in,
)

TOTAL_STEPS = 20
ROLLOUTS = [random_rollout(index) for index in range(3)]


def policy_learner(
    model: str,
    rank: Rank,
    temperature: float = 1.0,
    algorithm: AlgorithmSettings = ALGORITHM,
    **settings: Any,
) -> PolicyLearner:
    policy = PolicySettings(model=model, learner=learner_settings(**settings))
    return PolicyLearner(
        policy, algorithm, rank, total_steps=TOTAL_STEPS, temperature=temperature, max_response_tokens=16
    )


def critic_learner(model: str, rank: Rank, **settings: Any) -> CriticLearner:
    critic = CriticSettings(learner=learner_settings(**settings))
    return CriticLearner(critic, model, ALGORITHM, rank, total_steps=TOTAL_STEPS, max_response_tokens=16, seed=0)


def train_policy(learner: PolicyLearner, step: int = 0) -> PolicyReport:
    asks = learner._algorithm.asks_old_logprobs
    shards = [shard_of(rollout, learner.logprobs(rollout) if asks else None) for rollout in ROLLOUTS]
    return learner.train(step, shards, KL_COEFFICIENT)


def train_critic(learner: CriticLearner) -> CriticReport:
    shards = [shard_of(rollout, TokenColumn(rollout.logprobs)) for rollout in ROLLOUTS]
    return learner.train(0, shards, KL_COEFFICIENT)


def master_weights(learner: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = learner._engine.unwrapped.named_parameters()
    if learner._engine._zero_stage == 0:
        return {name: parameter.detach().clone() for name, parameter in parameters}
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in parameters}


def trained(learner: Any) -> dict[str, torch.Tensor]:
    return parameters_of(learner._engine.unwrapped)


# In bfloat16 the gradient of every micro-batch is rounded once, to a relative 2⁻⁹. The weights are compared before they
# are rounded: a step moves them by up to 1e-2, and may differ by a tenth of that where a gradient is near AdamW's ε.
@pytest.mark.parametrize(
    ("dtype", "zero_stage", "relative"),
    [
        ("float32", 0, 1e-6),
        ("float32", 3, 1e-6),
        ("bfloat16", 1, 2.0**-7),
        ("bfloat16", 2, 2.0**-7),
        ("bfloat16", 3, 2.0**-7),
    ],
)
def test_a_policy_step_does_not_depend_on_the_micro_batches(
    policy_model: str, single_rank: Rank, dtype: str, zero_stage: int, relative: float
):
    results = []
    for tokens in (32, 4096):
        learner = policy_learner(
            policy_model, single_rank, dtype=dtype, zero_stage=zero_stage, micro_batch_tokens=tokens
        )
        before = master_weights(learner)
        report = train_policy(learner)
        results.append((report, master_weights(learner)))
        assert largest_difference(before, results[-1][1]) > 1e-4
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= (1e-6 if dtype == "float32" else 1e-3)
    for name in ("loss", "entropy", "grad_norm", "clip_fraction"):
        assert getattr(small, name) == pytest.approx(getattr(large, name), rel=relative, abs=2 * relative), name
    assert large.grad_norm > 0.01


def test_a_policy_says_what_became_of_each_of_its_samples(policy_model: str, single_rank: Rank):
    """Six prompts of two samples: failed, and so alone, cut off, of equal scores, and trained."""
    algorithm = AlgorithmSettings(advantage="rloo", mask_truncated=True, drop_uniform_groups=True)
    learner = policy_learner(policy_model, single_rank, algorithm=algorithm)
    shards = []
    for index in range(3):
        rollout = random_rollout(index)
        ids = np.arange(4 * index, 4 * index + 4) + 100
        finish = np.array([FINISH_STOP, FINISH_LENGTH if index == 1 else FINISH_STOP] * 2, dtype=np.int8)
        rollout = replace(rollout, sample_ids=ids, prompt_ids=ids // 2, finish_reasons=finish)
        scores, causes = np.array([1.0, 2.0, 3.0, 3.0 if index == 2 else 5.0]), [""] * 4
        if index == 0:
            scores[2], causes[2] = np.nan, "no answer"
        shards.append(
            replace(shard_of(rollout, learner.logprobs(rollout)), rewards=RewardColumn(scores, tuple(causes), "v"))
        )
    assert learner.train(0, shards, KL_COEFFICIENT).samples == SampleUse(
        trained=((100, 101), (104, 104), (106, 106), (108, 109)),
        failed=((102, 102),),
        masked=((105, 105), (107, 107)),
        uniform=((103, 103), (110, 111)),
    )


TWICE = {"epochs": 2, "minibatches": 2, "entropy_coefficient": 0.01}
BY_SEQUENCE = ImportanceSettings(level="sequence", truncate=1.5, mask=(0.05, 20.0))
IN_LOSS = KLSettings(placement="loss", estimator="k3")


def masked_rollout(rollout: Rollout) -> Rollout:
    """Every third response token was not sampled by the policy."""
    mask = np.arange(len(rollout.logprobs)) % 3 != 1
    mask[rollout.response_starts()[:-1]] = True
    return replace(rollout, loss_mask=mask)


@pytest.mark.parametrize(
    "algorithm",
    [
        AlgorithmSettings(policy_loss="gspo", **TWICE),
        AlgorithmSettings(policy_loss="gspo", loss_aggregation="sequence", importance=BY_SEQUENCE, kl=IN_LOSS),
        AlgorithmSettings(policy_loss="cispo", loss_aggregation="constant", **TWICE),
        AlgorithmSettings(importance=BY_SEQUENCE, **TWICE),
        AlgorithmSettings(importance=BY_SEQUENCE, kl=IN_LOSS),
        AlgorithmSettings(importance=ImportanceSettings(mask=(0.2, 5.0)), **TWICE),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_any_algorithm_does_not_depend_on_micro_batches_or_chunks_of_logits(
    policy_model: str, single_rank: Rank, algorithm: AlgorithmSettings, masked: bool, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of five positions cut nearly every response; packs of 32 tokens hold one or two."""
    results = []
    rollouts = [masked_rollout(rollout) if masked else rollout for rollout in ROLLOUTS]
    for tokens, positions in ((32, 5), (4096, 4096)):
        vocabulary = read_model_facts(policy_model, "policy.model").vocab_size
        monkeypatch.setattr(token_loss, "CHUNK_BYTES", {"cpu": positions * vocabulary * 4})
        learner = policy_learner(policy_model, single_rank, algorithm=algorithm, micro_batch_tokens=tokens)
        before = trained(learner)
        asks = algorithm.asks_old_logprobs
        shards = [shard_of(rollout, learner.logprobs(rollout) if asks else None) for rollout in rollouts]
        results.append((learner.train(0, shards, KL_COEFFICIENT), trained(learner)))
        assert largest_difference(before, results[-1][1]) > 1e-4
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= 2e-6
    for name in ("loss", "entropy", "grad_norm", "clip_fraction", "importance_weight_mean", "mismatch_kl"):
        assert getattr(small, name) == pytest.approx(getattr(large, name), rel=2e-6, abs=4e-6), name
    for name in ("effective", "truncated", "masked"):
        name = f"importance_{name}_fraction"
        assert getattr(small, name) == pytest.approx(getattr(large, name), rel=2e-6), name
    assert 0 < large.importance_effective_fraction < 0.999


@pytest.mark.parametrize(
    "algorithm",
    [
        ALGORITHM.model_copy(update=TWICE),
        AlgorithmSettings(policy_loss="gspo", importance=BY_SEQUENCE, kl=IN_LOSS),
        AlgorithmSettings(policy_loss="cispo", old_logprobs="engine", importance=None, loss_aggregation="sequence"),
    ],
)
def test_columns_of_tokens_that_the_policy_did_not_sample_change_nothing(
    policy_model: str, single_rank: Rank, algorithm: AlgorithmSettings
):
    """Neither weights nor a single number of the report, bit-for-bit; of the policy and of the critic."""
    results = []
    for garbage in (None, 0.0, 1e4, -1e4):
        policy = policy_learner(policy_model, single_rank, algorithm=algorithm, micro_batch_tokens=48)
        critic = critic_learner(policy_model, single_rank)
        shards = []
        for rollout in map(masked_rollout, ROLLOUTS):
            shard = shard_of(rollout, policy.logprobs(rollout) if algorithm.asks_old_logprobs else None)
            unsampled = ~rollout.sampled()

            def spoilt(column: Any, unsampled: Any = unsampled, garbage: float | None = garbage) -> Any:
                return column if garbage is None else np.where(unsampled, np.float32(garbage), column)

            columns = {name: getattr(shard, name) for name in ("reference", "values", "policy")}
            changed = {name: TokenColumn(spoilt(given.data)) for name, given in columns.items() if given is not None}
            shards.append(replace(shard, rollout=replace(rollout, logprobs=spoilt(rollout.logprobs)), **changed))
        report = policy.train(0, shards, KL_COEFFICIENT)
        critic_shards = [replace(shard, policy=TokenColumn(shard.rollout.logprobs)) for shard in shards]
        results.append((report, critic.train(0, critic_shards, KL_COEFFICIENT), trained(policy), trained(critic)))
    clean = results[0]
    assert clean[0].stats.num_valid_tokens < sum(len(rollout.logprobs) for rollout in ROLLOUTS)
    for spoilt_result in results[1:]:
        assert spoilt_result[:2] == clean[:2]
        assert largest_difference(spoilt_result[2], clean[2]) == largest_difference(spoilt_result[3], clean[3]) == 0


def test_importance_by_sequence_is_measured_over_whole_responses(policy_model: str, single_rank: Rank):
    """By hand from the columns: the product of a response's ratios, whatever pack it is in."""
    algorithm = AlgorithmSettings(importance=ImportanceSettings(level="sequence", truncate=1.1, mask=(0.5, 1.5)))
    learner = policy_learner(policy_model, single_rank, algorithm=algorithm, micro_batch_tokens=48)
    rollouts = [masked_rollout(rollout) for rollout in ROLLOUTS]
    shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in rollouts]
    weights = []
    for shard in shards:
        assert shard.policy is not None
        log_ratios = np.where(shard.rollout.sampled(), shard.policy.data - shard.rollout.logprobs, 0.0)
        weights += np.exp(np.add.reduceat(log_ratios, shard.rollout.response_starts()[:-1])).tolist()
    found, w = learner.train(0, shards, KL_COEFFICIENT), np.array(weights)
    kept = (w >= 0.5) & (w <= 1.5)
    assert 0 < kept.sum() < 12
    assert found.importance_effective_fraction == pytest.approx(w.sum() ** 2 / (12 * (w**2).sum()), rel=1e-4)
    assert found.importance_masked_fraction == pytest.approx((~kept).mean())
    assert found.importance_truncated_fraction == pytest.approx((kept & (w > 1.1)).mean())


def test_truncated_responses_are_left_to_the_critic(policy_model: str, single_rank: Rank):
    """Where all were cut off, the policy gets no gradient and the critic all of it."""
    algorithm = ALGORITHM.model_copy(update={"mask_truncated": True, "entropy_coefficient": 0.0})
    learner = policy_learner(policy_model, single_rank, algorithm=algorithm)
    rollouts = [replace(rollout, finish_reasons=np.ones(4, dtype=np.int8)) for rollout in ROLLOUTS]
    shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in rollouts]
    report = learner.train(0, shards, KL_COEFFICIENT)
    assert (report.grad_norm, report.loss, report.stats.num_masked) == (0, 0, 12)
    assert critic_learner(policy_model, single_rank).train(0, shards, KL_COEFFICIENT).grad_norm > 0.01


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
        reports = [train_critic(learner) for _ in range(2)]
        results.append((reports, trained(learner)))
    (small, small_weights), (large, large_weights) = results
    assert largest_difference(small_weights, large_weights) <= 1e-6
    for one, other in zip(small, large, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=rounding(HIDDEN_SIZE))
        assert one.grad_norm == pytest.approx(other.grad_norm, abs=rounding(HIDDEN_SIZE))
    assert large[1].loss < large[0].loss


def test_first_minibatch_has_ratio_one(policy_model: str, single_rank: Rank):
    """With micro-batches cut differently than for the old log-probs, and temperature."""
    algorithm = ALGORITHM.model_copy(update={"epochs": 2, "minibatches": 2})
    learner = policy_learner(policy_model, single_rank, temperature=0.7, algorithm=algorithm, micro_batch_tokens=64)
    for step in range(2):
        learner._micro_batch_tokens = 64
        shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in ROLLOUTS]
        learner._micro_batch_tokens = 4096
        report = learner.train(step, shards, KL_COEFFICIENT)
        assert report.first_ratio_error <= 1e-5
        assert abs(report.first_approx_kl) <= 1e-5
        assert report.approx_kl > 1e-5, "later minibatches must have moved, or this proves nothing"


def test_dropout_is_off_while_policy_and_critic_train(single_rank: Rank, policy_tokenizer: Any, tmp_path: Path):
    """Half of everything would be dropped, in the trunk and in attention; the exported configuration says so still."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(policy_tokenizer)}
    model = str(tmp_path / "model")
    GPT2LMHeadModel(GPT2Config(**sizes, **rates)).save_pretrained(model)
    policy_tokenizer.save_pretrained(model)
    learner = policy_learner(model, single_rank)
    shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in ROLLOUTS]
    assert learner.train(0, shards, KL_COEFFICIENT).first_ratio_error <= 1e-5
    learner.export(str(tmp_path / "export"))
    assert GPT2Config.from_pretrained(tmp_path / "export").resid_pdrop == 0.5
    critic = critic_learner(model, single_rank)
    critic._engine.unwrapped.train()
    torch.nn.init.normal_(critic._engine.unwrapped.value_head.weight)
    [batch] = RolloutRows(ROLLOUTS).pack(range(4), 4096)
    assert torch.equal(*(critic._engine.unwrapped(batch) for _ in range(2)))


def test_engine_logprobs_as_the_old_ones_give_a_ratio_other_than_one(policy_model: str, single_rank: Rank):
    algorithm = ALGORITHM.model_copy(update={"old_logprobs": "engine", "importance": None})
    report = train_policy(policy_learner(policy_model, single_rank, algorithm=algorithm))
    assert report.first_ratio_error > 1e-3
    assert report.mismatch_max_abs > 1e-2
    assert report.importance_weight_mean == pytest.approx(1.0)


def test_one_update_needs_no_second_pass(policy_model: str, single_rank: Rank):
    """Old log-probs, importance weights, mismatch and KL come out of the training pass as if asked for before it."""
    algorithm = ALGORITHM.model_copy(update={"kl": KLSettings(placement="loss", estimator="k3")})
    assert not algorithm.asks_old_logprobs
    results = []
    for asks in (True, False):
        learner = policy_learner(policy_model, single_rank, algorithm=algorithm)
        shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in ROLLOUTS]
        given = shards if asks else [replace(shard, policy=None) for shard in shards]
        results.append((learner.train(0, given, KL_COEFFICIENT), trained(learner)))
    (asked, asked_weights), (own, own_weights) = results
    assert largest_difference(asked_weights, own_weights) <= 1e-6
    assert own.first_ratio_error == own.first_approx_kl == 0
    assert own.importance_weight_mean < 0.999
    for name in ("loss", "mismatch_kl", "mismatch_max_abs", "mismatch_mean_ratio", "importance_weight_mean"):
        assert getattr(own, name) == pytest.approx(getattr(asked, name), abs=2e-6), name
    assert own.stats.kl_reference == pytest.approx(asked.stats.kl_reference, abs=1e-5)


def test_while_the_critic_warms_up_the_policy_is_measured_but_stays(policy_model: str, single_rank: Rank):
    algorithm = ALGORITHM.model_copy(update={"critic_warmup_steps": 1})
    learner = policy_learner(policy_model, single_rank, algorithm=algorithm, warmup_steps=4)
    before = trained(learner)
    first = train_policy(learner)
    assert largest_difference(trained(learner), before) == 0
    assert (first.grad_norm, first.learning_rate) == (0, 0)
    assert first.entropy > 1
    second = train_policy(learner, step=1)
    assert second.learning_rate == pytest.approx(1e-2 / 4), "the policy's own schedule begins with its first update"
    assert largest_difference(trained(learner), before) > 0


def test_logprobs_do_not_depend_on_the_micro_batches(policy_model: str, single_rank: Rank):
    small = policy_learner(policy_model, single_rank, micro_batch_tokens=20)
    large = policy_learner(policy_model, single_rank)
    for rollout in ROLLOUTS:
        column = small.logprobs(rollout)
        assert column.data.shape == rollout.logprobs.shape
        np.testing.assert_allclose(column.data, large.logprobs(rollout).data, rtol=0, atol=2e-6)


def test_a_critic_starts_at_zero(policy_model: str, single_rank: Rank):
    critic = critic_learner(policy_model, single_rank)
    assert not any(critic.values(rollout).data.any() for rollout in ROLLOUTS)


def test_failed_rewards_take_no_part(policy_model: str, single_rank: Rank):
    """The step without the failed sample's tokens counted is the step of the others."""
    results = []
    for garbage in (1.0, 50.0):
        learner = policy_learner(policy_model, single_rank)
        shards = []
        for rollout in ROLLOUTS:
            shard = shard_of(rollout, learner.logprobs(rollout))
            scores = shard.rewards.scores.copy()
            scores[1] = np.nan
            rewards = replace(shard.rewards, scores=scores, failures=("", "too long", "", ""))
            assert shard.values is not None
            values = shard.values.data.copy()
            values[slice(*rollout.response_starts()[1:3])] = garbage
            shards.append(replace(shard, rewards=rewards, values=replace(shard.values, data=values)))
        report = learner.train(0, shards, KL_COEFFICIENT)
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
    top = ("backbone.layers.1.", "backbone.norm.", "value_head.")
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


def test_a_checkpoint_goes_through_every_layout_unharmed(tied_policy_model: str, single_rank: Rank, tmp_path: Path):
    """Each learner takes up what the one before has written: all bits of weights and moments come back."""
    layouts = [("float32", 0), ("bfloat16", 1), ("bfloat16", 3), ("bfloat16", 2), ("float32", 3), ("float32", 0)]

    def take_up(number: int, dtype: str, zero_stage: int) -> dict[str, torch.Tensor]:
        decay = 0.0 if number == 2 else 0.01  # which also changes the order
        settings = {"dtype": dtype, "zero_stage": zero_stage, "weight_decay": decay}
        learner = policy_learner(tied_policy_model, single_rank, **settings)
        if number:
            learner.load_checkpoint(str(tmp_path / str(number - 1)))
        else:
            train_policy(learner)
        learner.save_checkpoint(str(tmp_path / str(number)))
        state = tmp_path / str(number) / "policy" / "state"
        layout = Layout.of(state)
        assert layout == Layout(zero_stage, 1, dtype, 1 if number == 2 else 2)
        shapes = learner._engine._trained_parameters()[0]
        saved = SavedLearner(state, layout, list(shapes))
        assert saved.step == saved.counts["steps_done"] == learner._engine.steps_done > 0
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        return {f"{kind} {name}": saved.tensor(name, kind, shapes[name]).clone() for name in shapes for kind in kinds}

    first, *others = (take_up(number, *layout) for number, layout in enumerate(layouts))
    for other in others:
        assert largest_difference(other, first) == 0


def test_a_checkpoint_without_what_is_trained_now_is_named(policy_model: str, single_rank: Rank, tmp_path: Path):
    learner = policy_learner(policy_model, single_rank, trainable_top_layers=1)
    train_policy(learner)
    learner.save_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=r"embed_tokens.* trainable_top_layers"):
        policy_learner(policy_model, single_rank, dtype="bfloat16").load_checkpoint(str(tmp_path))


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
    layout = learner.weight_layout(20_000)
    assert len(layout) > 2
    buckets = [learner.weight_bucket(index) for index in range(len(layout))]
    assert [bucket.names for bucket in buckets if bucket is not None] == layout
    found = {name: tensor for bucket in buckets if bucket is not None for name, tensor in bucket.tensors()}
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


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_rotary_frequencies_are_not_rounded_to_bfloat16(policy_model: str, single_rank: Rank, zero_stage: int):
    """Position 1000 times a frequency of 8 bits is off by radians."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(policy_model)
    learners = (
        policy_learner(policy_model, single_rank, dtype="bfloat16", zero_stage=zero_stage),
        critic_learner(policy_model, single_rank, dtype="bfloat16", zero_stage=zero_stage),
    )
    expected = dict(plain.base_model.rotary_emb.named_buffers())
    assert expected.keys() == {"inv_freq", "original_inv_freq"}
    for learner in learners:
        [rotary] = [each for each in learner._engine.unwrapped.modules() if hasattr(each, "inv_freq")]
        assert not list(rotary.state_dict()), "a checkpoint must not hold them"
        for name, buffer in rotary.named_buffers():
            assert torch.equal(buffer, expected[name]), name


def test_rotary_frequencies_of_a_sharded_reference_are_not_rounded(policy_model: str, single_rank: Rank):
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(policy_model).base_model.rotary_emb.named_buffers())

    def build() -> Any:
        return build_policy(PolicySettings(model=policy_model), "bfloat16")

    module = FrozenEngine(build, single_rank, False, "bfloat16").module.module
    [rotary] = [each for each in module.modules() if hasattr(each, "inv_freq")]
    for name, buffer in rotary.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_what_a_model_keeps_beside_its_weights_is_exported(tmp_path: Path, tiny: Path, single_rank: Rank):
    """A router's correction bias is no parameter, and without it tokens go to other experts."""
    from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        tie_word_embeddings=False,
    )
    model = DeepseekV3ForCausalLM(config)
    bias = dict(model.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"].normal_()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    learner = policy_learner(str(tmp_path / "model"), single_rank)
    learner.export(str(tmp_path / "exported"))
    learner.save_checkpoint(str(tmp_path / "checkpoint"))
    export_policy(PolicySettings(model=str(tmp_path / "model")), tmp_path / "checkpoint", tmp_path / "of-checkpoint")
    for folder in ("exported", "of-checkpoint"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias"), bias), folder


class Weighted(torch.nn.Module):
    """Its gradient is what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, value: float) -> torch.Tensor:
        return (self.weight * value).float().sum()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_gradients_accumulate_in_float32(single_rank: Rank, zero_stage: int):
    """In bfloat16, 1 + 2⁻⁹ is 1: of 128 such micro-batches nothing would be left beside one large one."""
    settings = learner_settings(zero_stage=zero_stage, dtype="bfloat16", max_grad_norm=100.0)
    engine = DeepSpeedEngine(Weighted, settings, single_rank, "bfloat16", TOTAL_STEPS)
    gradients = [1.0, *[2.0**-9] * 128]
    for order in (gradients, gradients[::-1]):
        report = engine.optimizer_step(order, lambda value, _: engine.module(value))
        assert report.grad_norm == 1.25 * 2


def refusal(action: Callable[[], object]) -> tuple[FailureKind, str, str]:
    """What a guard says. Its traceback is let go of: it would keep an engine, which ZeRO-3 must not outlive."""
    try:
        action()
    except RoleFailure as failure:
        return failure.kind, failure.guard, failure.cause
    raise AssertionError("nobody refused")


@pytest.mark.parametrize(
    ("dtype", "zero_stage"),
    [("float32", 0), ("float32", 1), ("float32", 2), ("float32", 3), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)],
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(single_rank: Rank, dtype: str, zero_stage: int, broken: float):
    # With a word on ZeRO in it, a single float32 rank has the stage that it asks for.
    settings = learner_settings(zero_stage=zero_stage, dtype=dtype, deepspeed={"zero_optimization": {}})
    engine = DeepSpeedEngine(Weighted, settings, single_rank, dtype, TOTAL_STEPS)
    engine.optimizer_step([1.0], lambda value, _: engine.module(value))
    [(_, weight)] = engine.full_weights("")
    before = weight.clone()
    assert before.any()
    kind, guard, cause = refusal(partial(engine.optimizer_step, [1.0, broken], lambda value, _: engine.module(value)))
    assert (kind, guard) == (FailureKind.FATAL, "gradient")
    assert cause.startswith("the gradient of update 2 is not finite")
    [(_, weight)] = engine.full_weights("")
    assert torch.equal(weight, before)
    assert engine.steps_done == 1


@pytest.mark.parametrize("poisoned", ["reference", "values"])
def test_poisoned_columns_end_the_run_before_they_reach_the_weights(
    policy_model: str, single_rank: Rank, poisoned: str
):
    """One NaN among the reference's log-probs for the policy, or among the old values for the critic."""
    learner = (
        policy_learner(policy_model, single_rank)
        if poisoned == "reference"
        else critic_learner(policy_model, single_rank)
    )
    before = trained(learner)
    shards = [shard_of(rollout, TokenColumn(rollout.logprobs)) for rollout in ROLLOUTS]
    column = getattr(shards[1], poisoned).data.copy()
    column[0] = np.nan
    shards[1] = replace(shards[1], **{poisoned: TokenColumn(column)})
    assert refusal(partial(learner.train, 0, shards, KL_COEFFICIENT))[:2] == (FailureKind.FATAL, "gradient")
    assert largest_difference(before, trained(learner)) == 0


def test_settings_reach_deepspeed_and_can_be_overridden():
    settings = LearnerSettings(
        zero_stage=2,
        max_grad_norm=0.5,
        deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "steps_per_print": 7},
    )
    configuration = deepspeed_configuration(settings, "bfloat16", world_size=2)
    assert configuration["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert configuration["gradient_clipping"] == 0.5
    assert configuration["bf16"] == {"enabled": True}
    assert configuration["steps_per_print"] == 7


def test_one_float32_rank_has_nothing_to_shard():
    def stage(dtype: str, world_size: int, **settings: Any) -> int:
        configuration = deepspeed_configuration(LearnerSettings(**settings), dtype, world_size)
        return int(configuration["zero_optimization"]["stage"])

    assert [stage("float32", 1, zero_stage=asked) for asked in range(4)] == [0, 0, 0, 3]
    assert [stage("float32", 2, zero_stage=asked) for asked in range(4)] == [0, 1, 2, 3]
    assert [stage("bfloat16", 1, zero_stage=asked) for asked in range(4)] == [1, 1, 2, 3]
