"""Rows and columns become advantages: shared by all ranks, untouched by failed samples."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.experience import Experience, ExperienceShard, build_experience
from rlhf_ray.algorithms.segments import segment_ids, segment_sum
from rlhf_ray.config.algorithm import AlgorithmSettings, KLSettings, LengthSettings
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, RewardColumn, Rollout, TokenColumn

SAMPLES, GROUP, MAX_TOKENS = 8, 4, 12
KL = KLSettings(estimator="k3")
ALGORITHM = AlgorithmSettings(
    gamma=0.99,
    reward_whiten=True,
    score_clip=1.5,
    missing_eos_penalty=0.5,
    loss_aggregation="sequence",
    kl=KL,
)


def changed(**values: Any) -> AlgorithmSettings:
    return ALGORITHM.model_copy(update=values)


ALGORITHMS = [
    ALGORITHM,
    changed(advantage="rloo", kl=KLSettings(estimator="k1"), loss_aggregation="token"),
    changed(advantage="grpo", reward_whiten=False, kl=KLSettings(estimator="k3", placement="loss")),
    changed(advantage_whiten=False, score_clip=None, kl=KLSettings(estimator="k2")),
    changed(advantage="return_to_go", loss_aggregation="constant", length=LengthSettings(overlong_buffer=4)),
    changed(
        advantage="group_mean",
        reward_whiten=False,
        length=LengthSettings(rescale=0.5, penalty=0.1, target=6),
        drop_uniform_groups=True,
        mask_truncated=True,
    ),
]


def make_shard(index: int, failed: tuple[int, ...] = (2, 5)) -> ExperienceShard:
    """Eight samples of two prompts; the rewards of `failed` are failures."""
    random = np.random.default_rng(index)
    lengths = random.integers(1, 12, SAMPLES).astype(np.int32)
    total = int(lengths.sum())
    prompt_ids = np.repeat(np.arange(SAMPLES // GROUP) + index * 10, GROUP)

    def column(scale: float) -> TokenColumn:
        return TokenColumn((random.normal(size=total) * scale - 1).astype(np.float32))

    rollout = Rollout(
        tokens=random.integers(0, 99, total + SAMPLES).astype(np.int32),
        prompt_lengths=np.ones(SAMPLES, dtype=np.int32),
        response_lengths=lengths,
        logprobs=column(0.5).data,
        policy_versions=np.zeros(total, dtype=np.int32),
        finish_reasons=random.choice([FINISH_STOP, FINISH_LENGTH], SAMPLES).astype(np.int8),
        sample_ids=np.arange(SAMPLES) + index * SAMPLES,
        prompt_ids=prompt_ids,
    )
    scores = random.normal(size=SAMPLES) * 3 + 1
    scores[list(failed)] = math.nan
    failures = tuple("timed out" if sample in failed else "" for sample in range(SAMPLES))
    return ExperienceShard(rollout, RewardColumn(scores, failures, "v1"), column(0.5), column(1.0), column(0.5))


def build(shards: list[ExperienceShard], algorithm: AlgorithmSettings = ALGORITHM) -> Experience:
    return build_experience(shards, algorithm, 0.1, MAX_TOKENS)


def of_shard(flat: torch.Tensor, shards: list[ExperienceShard], index: int) -> torch.Tensor:
    """One shard's part of tokens."""
    return flat.split([len(shard.rollout.logprobs) for shard in shards])[index]


class SimulatedRanks:
    """An all-reduce over threads."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=20)
        self.parts: list[torch.Tensor | None] = [None] * num_ranks

    def all_reduce(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(sums: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = sums
            self.barrier.wait()
            total = sum(self.parts)  # type: ignore[arg-type]
            self.barrier.wait()
            return total

        return reduce


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spread", [([0, 1], [2, 3]), ([3], [1, 2, 0])])
def test_the_result_does_not_depend_on_how_shards_are_spread(
    algorithm: AlgorithmSettings, spread: tuple[list[int], list[int]]
) -> None:
    shards = [make_shard(index) for index in range(4)]
    whole = build(shards, algorithm)
    ranks = SimulatedRanks(2)

    def run(rank: int) -> Experience:
        return build_experience(
            [shards[index] for index in spread[rank]], algorithm, 0.1, MAX_TOKENS, ranks.all_reduce(rank)
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    for rank, result in enumerate(results):
        assert vars(result.stats) == pytest.approx(vars(whole.stats), rel=1e-12, abs=1e-12)
        for name in (
            "weights",
            "normalizer",
            "value_weights",
            "engine_logprobs",
            "old_logprobs",
            "advantages",
            "returns",
        ):
            flat = vars(whole)[name]
            if flat is None:
                assert vars(result)[name] is None
                continue
            expected = torch.cat([of_shard(flat, shards, index) for index in spread[rank]])
            torch.testing.assert_close(vars(result)[name], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e6, -7.0])
def test_failed_samples_have_no_influence(algorithm: AlgorithmSettings, garbage: float) -> None:
    shards = [make_shard(0), make_shard(1, failed=(0, 1, 2))]

    def spoil(shard: ExperienceShard) -> ExperienceShard:
        lengths = torch.tensor(shard.rollout.response_lengths)
        bad = (~torch.tensor(shard.rewards.ok))[segment_ids(lengths)].numpy()

        def spoiled(column: TokenColumn | None) -> TokenColumn:
            assert column is not None
            return TokenColumn(np.where(bad, np.float32(garbage), column.data))

        ok = shard.rewards.ok
        return replace(
            shard,
            rollout=replace(
                shard.rollout,
                tokens=np.zeros_like(shard.rollout.tokens),
                logprobs=spoiled(TokenColumn(shard.rollout.logprobs)).data,
                finish_reasons=np.where(ok, shard.rollout.finish_reasons, np.int8(FINISH_LENGTH)),
            ),
            rewards=replace(shard.rewards, scores=np.where(ok, shard.rewards.scores, garbage)),
            reference=spoiled(shard.reference),
            values=spoiled(shard.values),
            policy=spoiled(shard.policy),
        )

    clean, spoilt = build(shards, algorithm), build([spoil(shard) for shard in shards], algorithm)
    assert vars(clean.stats) == vars(spoilt.stats)
    failed = ~clean.ok[segment_ids(clean.lengths)]
    assert torch.equal(clean.advantages, spoilt.advantages)
    assert torch.equal(clean.weights, spoilt.weights)
    assert (clean.weights[failed] == 0).all()
    assert (clean.value_weights[failed] == 0).all()
    assert (clean.value_weights[~failed] > 0).all()
    assert (clean.normalizer[failed] == 0).all()
    assert (clean.advantages[failed] == 0).all()
    assert (clean.returns is None) == (spoilt.returns is None)
    if clean.returns is not None:
        assert torch.equal(clean.returns, spoilt.returns)


def test_statistics_by_hand() -> None:
    shards = [make_shard(0), make_shard(1)]
    stats = build(shards, changed(reward_whiten=False, score_clip=None, kl=KLSettings())).stats
    scores, lengths, kls, rewards, truncated = [], [], [], [], []
    for shard in shards:
        assert shard.policy is not None
        assert shard.reference is not None
        starts = shard.rollout.response_starts()
        for sample in np.flatnonzero(shard.rewards.ok):
            tokens = slice(starts[sample], starts[sample + 1])
            kl = float((shard.policy.data[tokens].astype(float) - shard.reference.data[tokens]).sum())
            cut = shard.rollout.finish_reasons[sample] == FINISH_LENGTH
            scores.append(shard.rewards.scores[sample])
            lengths.append(int(shard.rollout.response_lengths[sample]))
            kls.append(kl)
            truncated.append(cut)
            rewards.append(scores[-1] - 0.5 * cut - 0.1 * kl)
    assert (stats.num_samples, stats.num_valid, stats.num_valid_tokens) == (16, 12, sum(lengths))
    assert stats.shaped_reward_mean == pytest.approx(np.mean(rewards))
    assert stats.kl_reference == pytest.approx(np.mean(kls))
    assert stats.response_length_mean == pytest.approx(np.mean(lengths))
    assert stats.truncated_fraction == pytest.approx(np.mean(truncated))
    assert 0 < stats.truncated_fraction < 1


def test_whitened_advantages_of_all_valid_tokens_have_mean_0_and_std_1() -> None:
    experience = build([make_shard(0), make_shard(1)])
    valid = experience.advantages[experience.weights > 0]
    assert float(valid.mean()) == pytest.approx(0, abs=1e-12)
    assert float(valid.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_the_kl_statistic_is_k1_whatever_the_penalty_is() -> None:
    stats = [
        build([make_shard(0)], changed(kl=KL.model_copy(update={"estimator": name}))).stats
        for name in ("k1", "k2", "k3")
    ]
    assert stats[0].kl_reference == stats[1].kl_reference == stats[2].kl_reference
    assert stats[0].shaped_reward_mean != stats[1].shaped_reward_mean != stats[2].shaped_reward_mean


def test_whitened_scores_do_not_depend_on_the_scale_of_the_reward_model() -> None:
    def scaled(shard: ExperienceShard) -> ExperienceShard:
        return replace(shard, rewards=replace(shard.rewards, scores=shard.rewards.scores * 50 + 7))

    shards = [make_shard(0), make_shard(1)]
    for reward_whiten in (True, False):
        algorithm = changed(reward_whiten=reward_whiten, advantage_whiten=False)
        one, other = build(shards, algorithm), build([scaled(shard) for shard in shards], algorithm)
        same = torch.allclose(one.advantages, other.advantages, atol=1e-6)
        assert same == reward_whiten


def test_returns_are_not_whitened() -> None:
    shards = [make_shard(0)]
    whitened, plain = build(shards), build(shards, changed(advantage_whiten=False))
    assert torch.equal(whitened.returns, plain.returns)
    assert not torch.allclose(whitened.advantages, plain.advantages)


def test_leave_one_out_compares_summed_rewards_and_spreads_them_over_the_response() -> None:
    shard = make_shard(0, failed=())
    result = build(
        [shard],
        changed(advantage="rloo", advantage_whiten=False, reward_whiten=False, score_clip=None, kl=KLSettings()),
    )
    kl = segment_sum(result.old_logprobs - result.reference_logprobs, result.lengths)
    penalty = 0.5 * torch.tensor(shard.rollout.finish_reasons == FINISH_LENGTH)
    rewards = (torch.tensor(shard.rewards.scores) - penalty - 0.1 * kl).view(-1, GROUP)
    expected = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (GROUP - 1)).flatten()
    torch.testing.assert_close(result.advantages, expected[segment_ids(result.lengths)])


def test_a_sample_without_valid_peers_keeps_advantage_0_through_whitening() -> None:
    lonely = make_shard(0, failed=(0, 1, 2))
    result = build([lonely, make_shard(1)], changed(advantage="rloo"))
    advantages = result.advantages.split(result.lengths.tolist())
    assert (advantages[3] == 0).all()
    assert (advantages[4] != 0).all()


def test_a_penalty_in_the_loss_is_not_in_the_reward() -> None:
    shard = make_shard(0)
    algorithm = changed(kl=KLSettings(estimator="k3", placement="loss"))
    with_kl = build_experience([shard], algorithm, 5.0, MAX_TOKENS)
    without = build_experience([shard], algorithm, 0.0, MAX_TOKENS)
    assert torch.equal(with_kl.advantages, without.advantages)
    assert with_kl.reference_logprobs is not None
    assert with_kl.stats.kl_reference == without.stats.kl_reference


def test_which_logprobs_are_the_old_ones() -> None:
    shard = make_shard(0)
    assert shard.policy is not None
    recomputed = build([shard]).to(torch.device("cpu"), torch.float32)
    assert np.array_equal(recomputed.old_logprobs.numpy(), shard.policy.data)
    assert np.array_equal(recomputed.engine_logprobs.numpy(), shard.rollout.logprobs)
    engines = build([replace(shard, policy=None)], changed(old_logprobs="engine", importance=None))
    assert torch.equal(engines.old_logprobs, engines.engine_logprobs)
    one_update = build([replace(shard, policy=None)], changed(kl=KLSettings(estimator="k3", placement="loss")))
    assert one_update.old_logprobs is None
    assert one_update.stats.kl_reference is None


@pytest.mark.parametrize(
    ("values", "asks"),
    [
        ({"epochs": 1, "minibatches": 1, "kl": KLSettings(placement="loss", estimator="k3")}, False),
        ({"epochs": 1, "minibatches": 1, "kl": KLSettings(coefficient=0.0)}, False),
        ({"epochs": 1, "minibatches": 1, "kl": KLSettings()}, True),
        ({"epochs": 2, "kl": KLSettings(coefficient=0.0)}, True),
        ({"minibatches": 2, "kl": KLSettings(coefficient=0.0)}, True),
        ({"minibatches": 2, "old_logprobs": "engine", "importance": None}, False),
    ],
)
def test_old_logprobs_are_asked_for_only_where_the_training_pass_comes_too_late(
    values: dict[str, Any], asks: bool
) -> None:
    assert AlgorithmSettings(**values).asks_old_logprobs == asks


def test_a_step_without_a_single_score_has_no_means_and_no_weight() -> None:
    experience = build([make_shard(0, failed=tuple(range(SAMPLES)))])
    assert experience.stats.num_valid == 0
    assert math.isnan(experience.stats.shaped_reward_mean)
    assert not experience.weights.any()
    assert not experience.advantages.any()


def test_missing_and_misfitting_columns_are_refused() -> None:
    shard = make_shard(0)
    for name in ("values", "reference", "policy"):
        with pytest.raises(ValueError, match=f"no {name} column"):
            build([replace(shard, **{name: None})])
    with pytest.raises(ValueError, match="both have a values column"):
        build([shard, replace(make_shard(1), values=None)], changed(advantage="rloo"))
    with pytest.raises(ValueError, match="values: column of shape"):
        replace(shard, values=TokenColumn(np.zeros(3, dtype=np.float32)))
    free = build_experience([replace(shard, reference=None)], ALGORITHM, 0.0, MAX_TOKENS)
    assert free.stats.kl_reference is None


def with_unsampled_tokens(shard: ExperienceShard, garbage: float) -> ExperienceShard:
    """The same shard with tokens that the policy did not sample inserted before, between and behind its own."""
    random = np.random.default_rng(3)
    rollout = shard.rollout
    lengths = rollout.response_lengths
    inserted = [random.integers(0, 4, length + 1) for length in lengths]
    mask = np.concatenate(
        [
            np.concatenate([[False] * before + [True] for before in each[:-1]] + [[False] * each[-1]])
            for each in inserted
        ]
    ).astype(bool)
    new_lengths = np.array(
        [length + each.sum() for length, each in zip(lengths, inserted, strict=True)], dtype=np.int32
    )

    def spread(values: Any) -> Any:
        wide = np.full(len(mask), garbage).astype(values.dtype)
        wide[mask] = values
        return wide

    def column(given: TokenColumn | None) -> TokenColumn | None:
        return None if given is None else TokenColumn(spread(given.data))

    return replace(
        shard,
        rollout=replace(
            rollout,
            tokens=random.integers(0, 99, len(mask) + rollout.num_samples).astype(np.int32),
            response_lengths=new_lengths,
            logprobs=spread(rollout.logprobs),
            policy_versions=np.zeros(len(mask), dtype=np.int32),
            loss_mask=mask,
        ),
        reference=column(shard.reference),
        values=column(shard.values),
        policy=column(shard.policy),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("garbage", [0.0, 1e6, -1e6])
def test_tokens_that_the_policy_did_not_sample_are_as_if_they_were_not_there(
    algorithm: AlgorithmSettings, garbage: float
) -> None:
    shards = [make_shard(0), make_shard(1, failed=(0, 1, 2))]
    masked = [with_unsampled_tokens(shard, garbage) for shard in shards]
    plain, found = build(shards, algorithm), build(masked, algorithm)
    sampled = found.sampled
    assert torch.equal(sampled, torch.tensor(np.concatenate([shard.rollout.loss_mask for shard in masked])))
    assert vars(found.stats) == pytest.approx(vars(plain.stats), rel=1e-12, abs=1e-12)
    for name in ("advantages", "weights", "normalizer", "value_weights", "returns"):
        expected, flat = vars(plain)[name], vars(found)[name]
        assert (expected is None) == (flat is None)
        if expected is not None:
            torch.testing.assert_close(flat[sampled], expected, rtol=1e-12, atol=1e-12)
            assert not flat[~sampled].any()
    assert torch.equal(found.counted[sampled], plain.counted)


def test_truncated_responses_have_no_part_in_the_policy_loss_but_in_baselines_and_the_critics() -> None:
    shard = make_shard(0, failed=(2,))
    cut = torch.tensor((shard.rollout.finish_reasons == FINISH_LENGTH) & shard.rewards.ok)
    assert 0 < cut.sum() < 7
    without, masked = build([shard]), build([shard], changed(mask_truncated=True))
    in_cut = cut[masked.samples]
    assert not masked.weights[in_cut].any()
    assert not masked.normalizer[in_cut].any()
    assert torch.equal(masked.weights[~in_cut], without.weights[~in_cut])
    assert torch.equal(masked.value_weights, without.weights)
    assert torch.equal(masked.returns, without.returns)
    assert (without.stats.num_masked, masked.stats.num_masked) == (0, int(cut.sum()))
    # Whitening is over what the loss counts.
    kept = masked.advantages[masked.weights > 0]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12)
    group = {"advantage": "rloo", "advantage_whiten": False}
    plain, others = (build([shard], changed(**group, mask_truncated=mask)).advantages for mask in (False, True))
    assert torch.equal(plain, others), "a truncated response is still somebody's baseline"


def test_uniform_groups_are_dropped_only_if_asked() -> None:
    shards = [make_shard(0, failed=()), make_shard(1, failed=(1,))]
    scores = shards[1].rewards.scores.copy()
    scores[:GROUP] = np.where(np.isnan(scores[:GROUP]), math.nan, 0.5)
    shards[1] = replace(shards[1], rewards=replace(shards[1].rewards, scores=scores))
    settings = {
        "advantage": "grpo",
        "reward_whiten": False,
        "missing_eos_penalty": 0.0,
        "kl": KLSettings(coefficient=0),
    }
    kept, dropped = build(shards, changed(**settings)), build(shards, changed(**settings, drop_uniform_groups=True))
    uniform = (kept.samples >= SAMPLES) & (kept.samples < SAMPLES + GROUP) & kept.counted
    assert (kept.weights[uniform] > 0).all()
    assert not dropped.weights[uniform].any()
    assert not dropped.normalizer[uniform].any()
    assert torch.equal(dropped.weights[~uniform], kept.weights[~uniform])


def test_length_shaping_is_in_the_rewards() -> None:
    shard = make_shard(0, failed=(2,))
    plain = {"reward_whiten": False, "score_clip": None, "missing_eos_penalty": 0.0, "kl": KLSettings(coefficient=0)}
    lengths = LengthSettings(rescale=0.5, penalty=0.1, overlong_buffer=6, overlong_penalty=2.0)
    stats = build_experience([shard], changed(**plain, length=lengths), 0.0, MAX_TOKENS).stats
    ok = shard.rewards.ok
    expected = []
    for i in np.flatnonzero(ok):
        group = ok & (shard.rollout.prompt_ids == shard.rollout.prompt_ids[i])
        length, score = int(shard.rollout.response_lengths[i]), float(shard.rewards.scores[i])
        if score > 0:
            score /= 1 + 0.5 * length / shard.rollout.response_lengths[group].mean()
        expected.append(score - 0.1 * length - 2.0 * max(length - 6, 0) / 6)
    assert stats.shaped_reward_mean == pytest.approx(np.mean(expected))


def test_the_constant_normalizer_is_the_responses_that_count_times_the_limit() -> None:
    experience = build([make_shard(0), make_shard(1)], changed(loss_aggregation="constant"))
    assert float(experience.normalizer.double().sum()) == pytest.approx(12 * MAX_TOKENS, rel=1e-6)
    assert set(experience.weights.tolist()) == {0.0, 1.0}
