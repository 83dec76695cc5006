"""Losses of policy and critic: gradients, clipping, sums, and what is measured beside them."""

import math

import pytest
import torch

from rlhf_ray.algorithms.losses import (
    PolicyLoss,
    explained_variance,
    mismatch,
    policy_loss,
    token_weights,
    value_loss,
)
from rlhf_ray.algorithms.segments import segment_ids
from rlhf_ray.config.algorithm import AlgorithmSettings


def tokens(seed: int = 0, count: int = 60) -> tuple[torch.Tensor, ...]:
    """New and old log-probs, advantages and weights."""
    generator = torch.Generator().manual_seed(seed)
    old, advantages, noise = torch.randn(3, count, dtype=torch.float64, generator=generator)
    weights = torch.rand(count, dtype=torch.float64, generator=generator) + 0.1
    return (old + 0.4 * noise).requires_grad_(), old, advantages, weights


CLIP = AlgorithmSettings(clip_low=0.2, clip_high=0.3)


def clip(*arguments: torch.Tensor, dual_clip: float | None = None) -> PolicyLoss:
    return policy_loss(*arguments, AlgorithmSettings(clip_low=0.2, clip_high=0.3, dual_clip=dual_clip))


def one(ratio: float, advantage: float, dual_clip: float | None = None) -> tuple[float, float, float]:
    """Loss, clip fraction and gradient with respect to the log-prob of a single token."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, unit = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = clip(logprob, zero, advantage * unit, unit, dual_clip=dual_clip)
    loss.loss_sum.backward()
    return loss.loss_sum.item(), loss.clip_fraction_sum.item(), logprob.grad.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_step_the_gradient_is_the_vanilla_policy_gradient(dtype: torch.dtype) -> None:
    _, old, advantages, weights = (each.detach().to(dtype) for each in tokens())
    logprobs = old.clone().requires_grad_()
    loss = clip(logprobs, old, advantages, weights, dual_clip=3.0)
    loss.loss_sum.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages)
    assert float(loss.approx_kl_sum) == 0
    assert float(loss.clip_fraction_sum) == 0
    assert float(loss.max_abs_log_ratio) == 0
    assert float(loss.ratio_sum) == float(weights.sum())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.1, 2.0, -2.2, 0, -2.2),
        (1.5, 2.0, -2.6, 1, 0.0),
        (0.5, 2.0, -1.0, 0, -1.0),
        (0.5, -2.0, 1.6, 1, 0.0),
        (1.5, -2.0, 3.0, 0, 3.0),
        (9.0, 0.0, 0.0, 0, 0.0),
    ],
)
def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough(
    ratio: float, advantage: float, loss: float, clipped: float, gradient: float
) -> None:
    assert one(ratio, advantage) == pytest.approx((loss, clipped, gradient), abs=1e-12)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    assert one(5.0, -2.0) == pytest.approx((10.0, 0, 10.0))
    assert one(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 1, 0.0))
    assert one(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 0, 4.0))
    assert one(5.0, 2.0, dual_clip=3.0) == pytest.approx((-2.6, 1, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [100.0, 1e4, -1e4])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_ratio_beyond_any_float_leaves_loss_and_gradient_finite(
    dtype: torch.dtype, distance: float, dual_clip: float | None
) -> None:
    """Beside an ordinary token, whose part must stay what it is."""
    for advantage in (2.0, 0.0, -2.0):
        logprobs = torch.tensor([distance, math.log(1.1)], dtype=dtype, requires_grad=True)
        advantages = torch.tensor([advantage, 1.0], dtype=dtype)
        loss = clip(logprobs, torch.zeros(2, dtype=dtype), advantages, torch.ones(2, dtype=dtype), dual_clip=dual_clip)
        loss.loss_sum.backward()
        assert all(value.isfinite() for value in vars(loss).values())
        assert logprobs.grad.isfinite().all()
        assert float(logprobs.grad[1]) == pytest.approx(-1.1)
        assert float(loss.max_abs_log_ratio) == abs(distance)
        first = float(loss.loss_sum.detach()) + 1.1
        if distance > 0 and advantage > 0:
            assert (first, float(logprobs.grad[0])) == (pytest.approx(-2.6), 0)
        if distance > 0 and advantage < 0 and dual_clip:
            assert (first, float(logprobs.grad[0])) == (pytest.approx(6.0), 0)


def test_policy_loss_equals_the_loop_over_tokens() -> None:
    logprobs, old, advantages, weights = (each.detach() for each in tokens())
    expected = kl = clipped = 0.0
    for new, before, advantage, weight in zip(
        *(each.tolist() for each in (logprobs, old, advantages, weights)), strict=True
    ):
        ratio = math.exp(new - before)
        bounded = min(max(ratio, 0.8), 1.3)
        expected -= weight * min(ratio * advantage, bounded * advantage)
        kl += weight * ((ratio - 1) - math.log(ratio))
        clipped += weight * (bounded * advantage < ratio * advantage)
    loss = clip(logprobs, old, advantages, weights)
    assert float(loss.loss_sum) == pytest.approx(expected, abs=1e-12)
    assert float(loss.approx_kl_sum) == pytest.approx(kl, abs=1e-12)
    assert float(loss.clip_fraction_sum) == pytest.approx(clipped, abs=1e-12)
    assert float(loss.ratio_sum) == pytest.approx(float((weights * (logprobs - old).exp()).sum()))


def test_sums_and_gradients_do_not_depend_on_the_split() -> None:
    logprobs, old, advantages, weights = tokens()
    values, old_values, returns, _ = tokens(1)
    arguments, value_arguments = (logprobs, old, advantages, weights), (values, old_values, returns, weights)
    whole, value_whole = clip(*arguments), value_loss(*value_arguments, clip=0.2)
    gradients = torch.autograd.grad(whole.loss_sum + value_whole.loss_sum, (logprobs, values))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    pieces = order.split([1, 17, 30, 12])
    parts = [clip(*(each[piece] for each in arguments)) for piece in pieces]
    value_parts = [
        value_loss(values[piece], old_values[piece], returns[piece], weights[piece], clip=0.2) for piece in pieces
    ]
    total = sum(part.loss_sum for part in parts) + sum(part.loss_sum for part in value_parts)
    for name in ("loss_sum", "clip_fraction_sum", "approx_kl_sum", "ratio_sum"):
        torch.testing.assert_close(sum(vars(part)[name] for part in parts), vars(whole)[name])
    assert max(part.max_abs_log_ratio for part in parts) == whole.max_abs_log_ratio
    for name in ("loss_sum", "clip_fraction_sum"):
        torch.testing.assert_close(sum(vars(part)[name] for part in value_parts), vars(value_whole)[name])
    for got, expected in zip(torch.autograd.grad(total, (logprobs, values)), gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_tokens_of_weight_0_have_no_influence_even_if_not_finite() -> None:
    logprobs, old, advantages, weights = (each.detach() for each in tokens())
    values, old_values, returns, _ = (each.detach() for each in tokens(1))
    importance = torch.full_like(old, 1.5)
    kept = torch.arange(60) % 4 > 0

    def run(bad: float | None) -> list[torch.Tensor]:
        chosen = torch.ones_like(kept) if bad is not None else kept
        inputs = [
            (each if bad is None else torch.where(kept, each, bad))[chosen]
            for each in (logprobs, old, advantages, importance, values, old_values, returns)
        ]
        new, before, advantage, factor, value, old_value, target = inputs
        new.requires_grad_()
        value.requires_grad_()
        weight = torch.where(kept, weights, 0.0)[chosen]
        loss = policy_loss(new, before, advantage, weight, CLIP, factor)
        critic = value_loss(value, old_value, target, weight, clip=0.2)
        gradients = torch.autograd.grad(loss.loss_sum + critic.loss_sum, (new, value))
        if bad is not None:
            assert all((each[~kept] == 0).all() for each in gradients)
            gradients = tuple(each[kept] for each in gradients)
        return [*vars(loss).values(), *vars(critic).values(), *gradients]

    clean = run(None)
    for bad in (math.nan, math.inf, -math.inf, 1e6):
        for got, expected in zip(run(bad), clean, strict=True):
            torch.testing.assert_close(got, expected)


def test_approx_kl_is_never_negative_and_half_precision_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2000, generator=generator)
    new = old + 1e-6 * torch.randn(2000, generator=generator)
    for index in range(500):
        piece = slice(index, index + 1)
        assert clip(new[piece], old[piece], torch.ones(1), torch.ones(1)).approx_kl_sum >= 0
    assert clip(new.bfloat16(), old.bfloat16(), old, torch.ones(2000)).loss_sum.dtype == torch.float32


def test_importance_weights_scale_the_loss_and_nothing_else() -> None:
    logprobs, old, advantages, weights = tokens()
    factor = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    weighted = policy_loss(logprobs, old, advantages, weights, CLIP, factor)
    plain = clip(logprobs, old, advantages, weights)
    torch.testing.assert_close(weighted.loss_sum, clip(logprobs, old, advantages, weights * factor).loss_sum)
    assert weighted.clip_fraction_sum == plain.clip_fraction_sum
    assert weighted.approx_kl_sum == plain.approx_kl_sum


def single_value(value: float, clip: float | None) -> tuple[float, float, float]:
    """Loss, clip fraction and gradient for old value 0 and return 1."""
    new = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss = value_loss(new, torch.zeros(1), torch.ones(1), torch.ones(1), clip)
    loss.loss_sum.backward()
    return loss.loss_sum.item(), loss.clip_fraction_sum.item(), new.grad.item()


def test_value_loss_takes_the_larger_of_the_clipped_and_the_plain_error() -> None:
    assert single_value(0.1, 0.2) == pytest.approx((0.405, 0, -0.9))
    assert single_value(0.8, 0.2) == pytest.approx((0.32, 1, 0.0))
    assert single_value(0.8, None) == pytest.approx((0.02, 0, -0.2))
    assert single_value(-0.5, 0.2) == pytest.approx((1.125, 0, -1.5))


def test_weights_over_their_sum_give_the_two_means() -> None:
    lengths, ok = torch.tensor([3, 1, 5, 2]), torch.tensor([True, True, False, True])
    loss = torch.arange(11, dtype=torch.float64) ** 2
    parts = [part for part, valid in zip(loss.split(lengths.tolist()), ok, strict=True) if valid]
    for aggregation, expected in (
        ("token", torch.cat(parts).mean()),
        ("sequence", torch.stack([part.mean() for part in parts]).mean()),
    ):
        weights = token_weights(lengths, ok[segment_ids(lengths)], aggregation)  # type: ignore[arg-type]
        assert float((weights * loss).sum() / weights.sum()) == pytest.approx(float(expected), rel=1e-6)
        assert (weights[4:9] == 0).all()


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        token_weights(torch.tensor([1]), torch.tensor([True]), "median")  # type: ignore[arg-type]


def test_explained_variance_over_two_ranks_is_that_of_all_tokens() -> None:
    values, returns, *_ = (each.detach() for each in tokens())
    mask = torch.arange(60) % 5 > 0
    error = (returns - values)[mask]
    expected = 1 - float(error.var(correction=0) / returns[mask].var(correction=0))
    values[~mask] = math.nan
    halves = [(values[piece], returns[piece], mask[piece]) for piece in (slice(0, 23), slice(23, 60))]
    collected: list[torch.Tensor] = []

    def collect(sums: torch.Tensor) -> torch.Tensor:
        collected.append(sums)
        return sums

    for half in halves:
        explained_variance(*half, all_reduce=collect)
    for half in halves:
        assert explained_variance(*half, all_reduce=lambda _: collected[0] + collected[1]) == pytest.approx(expected)
    assert explained_variance(values, returns, mask) == pytest.approx(expected)


def test_explained_variance_of_perfect_constant_and_undefined_critics() -> None:
    returns, mask = torch.arange(4.0), torch.ones(4, dtype=torch.bool)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((4,), 9.0), returns, mask) == 0
    assert math.isnan(explained_variance(returns, torch.ones(4), mask))


def test_mismatch_by_hand_and_in_parts() -> None:
    learner, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    found = mismatch(learner, engine)
    assert float(found.kl_sum) == pytest.approx((math.exp(0.5) - 1.5) + (math.exp(-1) - 1 + 1))
    assert float(found.max_abs) == 1.0
    assert float(found.ratio_sum) == pytest.approx(1 + math.exp(0.5) + math.exp(1))
    parts = [mismatch(learner[part], engine[part]) for part in (slice(0, 1), slice(1, 3), slice(0, 0))]
    assert sum(float(part.kl_sum) for part in parts) == pytest.approx(float(found.kl_sum))
    assert max(part.max_abs for part in parts) == found.max_abs
