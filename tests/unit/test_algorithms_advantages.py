"""Advantages against brute force."""

import math
from typing import get_args

import pytest
import torch

from rlhf_ray.algorithms.advantages import (
    ESTIMATORS,
    AdvantageInputs,
    gae,
    group_mean,
    grpo,
    in_uniform_group,
    return_to_go,
    rloo,
    whiten,
)
from rlhf_ray.algorithms.segments import Moments, segment_ids
from rlhf_ray.config.algorithm import ADVANTAGES, AlgorithmSettings


def brute_force_gae(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """Each advantage as the sum of its definition, O(T²)."""
    bootstrapped = [*values, 0.0]
    advantages = []
    for t in range(len(rewards)):
        total = 0.0
        for k in range(t, len(rewards)):
            delta = rewards[k] + gamma * bootstrapped[k + 1] - bootstrapped[k]
            total += (gamma * gae_lambda) ** (k - t) * delta
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_brute_force(seed: int, gamma: float, gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (9,), generator=generator)
    total = int(lengths.sum())
    rewards, values = torch.randn(2, total, dtype=torch.float64, generator=generator)
    mask = torch.rand(total, generator=generator) < (1.0 if seed % 2 else 0.7)
    expected = torch.zeros(total, dtype=torch.float64)
    start = 0
    for length in lengths.tolist():
        kept = [t for t in range(start, start + length) if mask[t]]
        expected[kept] = torch.tensor(
            brute_force_gae(rewards[kept].tolist(), values[kept].tolist(), gamma, gae_lambda), dtype=torch.float64
        )
        start += length
    garbage = torch.where(mask, 0.0, math.nan)

    advantages, returns = gae(rewards + garbage, values + garbage, lengths, gamma, gae_lambda, mask)

    assert (advantages - expected).abs().max() <= 1e-10
    assert (returns - torch.where(mask, expected + values, 0.0)).abs().max() <= 1e-10


def test_gae_without_discount_is_the_rest_of_the_rewards_less_the_value() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0])
    values = torch.tensor([0.5, 0.25, 0.0, 1.0, 1.0])
    advantages, returns = gae(rewards, values, torch.tensor([3, 2]), 1.0, 1.0)
    assert advantages.tolist() == [0.5, 0.75, 1.0, 0.0, 1.0]
    assert returns.tolist() == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert advantages.dtype == torch.float32


def random_groups(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, dtype=torch.float64, generator=generator)
    group_ids = torch.randint(0, 12, (40,), generator=generator) * 1000
    ok = torch.rand(40, generator=generator) < 0.7
    return scores, group_ids, ok


@pytest.mark.parametrize("seed", range(10))
def test_group_advantages_equal_the_loop_over_groups(seed: int) -> None:
    scores, group_ids, ok = random_groups(seed)
    expected_rloo, expected_grpo, expected_mean = torch.zeros(3, 40, dtype=torch.float64)
    for i in range(40):
        group = [j for j in range(40) if group_ids[j] == group_ids[i] and ok[j]]
        if not ok[i] or len(group) < 2:
            continue
        expected_rloo[i] = scores[i] - sum(scores[j] for j in group if j != i) / (len(group) - 1)
        expected_grpo[i] = (scores[i] - scores[group].mean()) / (scores[group].std(correction=1) + 1e-6)
        expected_mean[i] = scores[i] - scores[group].mean()
    garbage = torch.where(ok, scores, math.nan)
    torch.testing.assert_close(group_mean(garbage, group_ids, ok), expected_mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(rloo(garbage, group_ids, ok), expected_rloo, atol=1e-12, rtol=0)
    torch.testing.assert_close(grpo(garbage, group_ids, ok), expected_grpo, atol=1e-12, rtol=0)
    assert expected_rloo.count_nonzero() > 10


def test_a_group_of_equal_scores_has_no_advantage() -> None:
    scores, ok = torch.full((3,), 0.1, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    group_ids = torch.zeros(3, dtype=torch.int64)
    assert rloo(scores, group_ids, ok).abs().max() < 1e-15
    assert grpo(scores, group_ids, ok).abs().max() < 1e-9
    assert group_mean(scores, group_ids, ok).abs().max() < 1e-15


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_return_to_go_is_the_discounted_sum_of_the_rewards_to_come(gamma: float) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (7,), generator=generator)
    rewards = torch.randn(int(lengths.sum()), dtype=torch.float64, generator=generator)
    mask = torch.rand(len(rewards), generator=generator) < 0.7
    expected, sample = torch.zeros_like(rewards), segment_ids(lengths)
    for t in mask.nonzero()[:, 0].tolist():
        to_come = [k for k in range(t, len(rewards)) if mask[k] and sample[k] == sample[t]]
        expected[t] = sum(gamma**step * rewards[k] for step, k in enumerate(to_come))
    found = return_to_go(torch.where(mask, rewards, math.nan), lengths, gamma, mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_uniform_groups_by_hand() -> None:
    nan = math.nan
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, nan, 0.5, 0.5, 2.0, nan], dtype=torch.float64)
    group_ids = torch.tensor([7, 3, 7, 3, 3, 9, 9, 5, 5])
    ok = ~scores.isnan()
    # Group 7 has 1 and 1, group 3 has 0 and 1, group 9 has 0.5 twice, and group 5 a single valid score.
    uniform = [True, False, True, False, False, True, True, True, False]
    assert in_uniform_group(scores, group_ids, ok).tolist() == uniform
    assert torch.equal(in_uniform_group(scores, torch.arange(9), ok), ok)


def test_the_settings_and_the_tables_name_the_same_estimators() -> None:
    named = set(get_args(AlgorithmSettings.model_fields["advantage"].annotation))
    assert named == set(ADVANTAGES) == set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_sees_only_what_it_says_it_needs(name: str) -> None:
    """Against the functions on each response with its unsampled tokens cut out, one response or group at a time."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([3, 1, 4, 2, 5, 2])
    group_ids, ok = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([True, True, True, True, False, True])
    sample, total = segment_ids(lengths), int(lengths.sum())
    mask = ok[sample] & (torch.arange(total) % 4 > 0) | (torch.arange(total) == 3)
    rewards, values = torch.randn(2, total, dtype=torch.float64, generator=generator)
    rewards = torch.where(mask, rewards, 0.0)
    algorithm = AlgorithmSettings(gamma=0.9, gae_lambda=0.8)
    needs = ADVANTAGES[name]
    inputs = AdvantageInputs(rewards, lengths, mask, values if needs.critic else None, group_ids, ok)
    found = ESTIMATORS[name](inputs, algorithm)

    sums = torch.stack([part.sum() for part in rewards.split(lengths.tolist())])
    expected = torch.zeros(total, dtype=torch.float64)
    for i in range(len(lengths)):
        tokens = (mask & (sample == i)).nonzero()[:, 0]
        others = [j for j in range(len(lengths)) if group_ids[j] == group_ids[i] and ok[j] and j != i]
        if not ok[i] or (needs.group and not others):
            continue
        group = sums[[i, *others]]
        if name == "gae":
            brute = brute_force_gae(rewards[tokens].tolist(), values[tokens].tolist(), 0.9, 0.8)
            expected[tokens] = torch.tensor(brute, dtype=torch.float64)
        elif name == "return_to_go":
            for place, t in enumerate(tokens.tolist()):
                expected[t] = sum(0.9**step * rewards[k] for step, k in enumerate(tokens[place:].tolist()))
        elif name == "rloo":
            expected[tokens] = sums[i] - sums[others].mean()
        elif name == "grpo":
            expected[tokens] = (sums[i] - group.mean()) / (group.std(correction=1) + 1e-6)
        else:
            assert name == "group_mean"
            expected[tokens] = sums[i] - group.mean()
    torch.testing.assert_close(found.advantages, expected, atol=1e-12, rtol=0)
    assert (found.returns is not None) == needs.critic
    # Samples 3 and 5 have no other valid one in their group.
    compared = mask & (sample < 3) if needs.group else mask
    assert torch.equal(found.informative, compared)


def test_an_estimator_with_a_critic_refuses_to_do_without() -> None:
    one, ok = torch.ones(1), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs values"):
        ESTIMATORS["gae"](AdvantageInputs(one, one.long(), ok, None, one.long(), ok), AlgorithmSettings())


def test_whitening_gives_mean_0_and_std_1_within_the_mask() -> None:
    values = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 3
    mask = torch.arange(500) % 3 > 0
    values[~mask] = math.nan
    moments = Moments.of(values, mask)
    whitened = whiten(values, mask, moments)
    assert abs(float(whitened[mask].mean())) < 1e-12
    assert float(whitened[mask].std(correction=0)) == pytest.approx(1, abs=1e-8)
    assert (whitened[~mask] == 0).all()


def test_whitening_equal_values_gives_0_and_not_infinity() -> None:
    values, mask = torch.full((4,), 2.0), torch.ones(4, dtype=torch.bool)
    assert whiten(values, mask, Moments.of(values)).tolist() == [0, 0, 0, 0]
