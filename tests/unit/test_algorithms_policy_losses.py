"""Every loss in the table, against a naive implementation of its paper that goes through one response after another."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from rlhf_ray.algorithms.losses import (
    POLICY_LOSSES,
    Aggregation,
    PolicyLoss,
    normalizer_weights,
    policy_loss,
    sequence_log_ratios,
    token_weights,
)
from rlhf_ray.algorithms.segments import segment_ids
from rlhf_ray.config.algorithm import AlgorithmSettings

LENGTHS = torch.tensor([3, 1, 6, 2, 4])
SAMPLE = segment_ids(LENGTHS)
COUNTED = torch.tensor([True] * 3 + [True] + [True, False, True, True, False, True] + [False, False] + [True] * 4)
"""Response 2 holds two tokens that the policy did not sample, response 3 has no score."""
MAX_TOKENS = 10
LOW, HIGH = 0.15, 0.25


def settings(name: str, **values: Any) -> AlgorithmSettings:
    return AlgorithmSettings(policy_loss=name, clip_low=LOW, clip_high=HIGH, **values)


def responses(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New log-probs (with gradient), old ones, and an advantage for each response."""
    generator = torch.Generator().manual_seed(seed)
    old, noise = torch.randn(2, len(SAMPLE), dtype=torch.float64, generator=generator)
    advantages = torch.randn(len(LENGTHS), dtype=torch.float64, generator=generator)
    return (old + 0.5 * noise).requires_grad_(), old, advantages


def naive_ppo(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Schulman et al. 2017, eq. 7, for the tokens of one response."""
    terms = []
    for t in range(len(new)):
        ratio = torch.exp(new[t] - old[t])
        terms.append(-torch.min(ratio * advantage, torch.clamp(ratio, 1 - LOW, 1 + HIGH) * advantage))
    return torch.stack(terms)


def naive_gspo(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Zheng et al. 2025, eq. 5 and 7: one ratio of likelihoods to the power of 1 / |y|, one term for the response."""
    likelihood_ratio = torch.exp(new.sum() - old.sum())
    ratio = likelihood_ratio ** (1 / len(new))
    return -torch.min(ratio * advantage, torch.clamp(ratio, 1 - LOW, 1 + HIGH) * advantage).expand(len(new))


def naive_cispo(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """MiniMax-M1, eq. 4 and 5."""
    weight = torch.clamp(torch.exp(new - old), 1 - LOW, 1 + HIGH).detach()
    return -weight * advantage * new


NAIVE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ppo": naive_ppo,
    "gspo": naive_gspo,
    "cispo": naive_cispo,
}


def naive_loss(name: str, new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mean: str) -> torch.Tensor:
    """The aggregated loss, response by response, of sampled tokens only."""
    of_responses = []
    for i in range(len(LENGTHS)):
        tokens = (COUNTED & (i == SAMPLE)).nonzero()[:, 0]
        if len(tokens):
            of_responses.append(NAIVE[name](new[tokens], old[tokens], advantages[i]))
    if mean == "token":
        return torch.cat(of_responses).mean()
    if mean == "sequence":
        return torch.stack([each.mean() for each in of_responses]).mean()
    return torch.stack([each.sum() for each in of_responses]).sum() / (len(of_responses) * MAX_TOKENS)


def summed(
    name: str,
    new: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    pieces: list[torch.Tensor] | None = None,
    **values: Any,
) -> PolicyLoss:
    """The table's loss, over pieces of the tokens or all at once."""
    ratios = None
    if POLICY_LOSSES[name].by_sequence:
        ratios = sequence_log_ratios(new, old, weights != 0, LENGTHS)
    parts = [
        policy_loss(
            new[piece],
            old[piece],
            advantages[SAMPLE][piece],
            weights[piece],
            settings(name, **values),
            None,
            None if ratios is None else ratios[piece],
        )
        for piece in pieces or [torch.arange(len(new))]
    ]
    return PolicyLoss(
        *(sum(vars(part)[field] for part in parts) for field in list(vars(parts[0]))[:-1]),
        max(part.max_abs_log_ratio for part in parts),
    )


def test_the_settings_and_the_table_name_the_same_losses() -> None:
    named = set(get_args(AlgorithmSettings.model_fields["policy_loss"].annotation))
    assert named == set(POLICY_LOSSES) == set(NAIVE)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_the_naive_ones(name: str, aggregation: Aggregation, seed: int) -> None:
    new, old, advantages = responses(seed)
    weights = token_weights(LENGTHS, COUNTED, aggregation).double()
    normalizer = normalizer_weights(weights, LENGTHS, aggregation, MAX_TOKENS).sum()
    loss = summed(name, new, old, advantages, weights).loss_sum / normalizer
    [gradient] = torch.autograd.grad(loss, new)
    expected = naive_loss(name, new, old, advantages, aggregation)
    [expected_gradient] = torch.autograd.grad(expected, new)
    # Weights are float32, so a third is one to 2⁻²⁵.
    torch.testing.assert_close(loss, expected, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-7, atol=2e-7)
    assert gradient.count_nonzero() > 3


def test_the_gradient_of_gspo_by_finite_differences() -> None:
    new, old, advantages = responses()
    weights = token_weights(LENGTHS, COUNTED, "sequence").double()
    [gradient] = torch.autograd.grad(summed("gspo", new, old, advantages, weights).loss_sum, new)
    step = 1e-6
    for t in range(len(new)):
        moved = [new.detach().clone() for _ in range(2)]
        moved[0][t] += step
        moved[1][t] -= step
        above, below = (float(summed("gspo", each, old, advantages, weights).loss_sum) for each in moved)
        assert float(gradient[t]) == pytest.approx((above - below) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_sums_and_gradients_do_not_depend_on_the_partition(name: str) -> None:
    """Also within a sequence, as where its logits are computed in chunks."""
    new, old, advantages = responses()
    weights = token_weights(LENGTHS, COUNTED, "sequence").double()
    whole = summed(name, new, old, advantages, weights)
    pieces = list(torch.randperm(len(new), generator=torch.Generator().manual_seed(1)).split([2, 7, 1, 6]))
    parts = summed(name, new, old, advantages, weights, pieces)
    for found, expected in zip(vars(parts).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.loss_sum, new)[0] for each in (whole, parts)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("garbage", [1e6, -1e6, 0.0])
def test_tokens_that_do_not_count_have_no_influence(name: str, garbage: float) -> None:
    new, old, advantages = responses()
    weights = token_weights(LENGTHS, COUNTED, "token").double()
    expected = summed(name, new, old, advantages, weights)
    spoilt_new = torch.where(COUNTED, new.detach(), garbage).requires_grad_()
    spoilt_old = torch.where(COUNTED, old, -garbage)
    found = summed(name, spoilt_new, spoilt_old, advantages, weights)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(each.loss_sum, leaf)[0] for each, leaf in ((found, spoilt_new), (expected, new))]
    assert torch.equal(*gradients)
    assert not gradients[0][~COUNTED].any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_without_a_step_every_loss_has_the_vanilla_policy_gradient(name: str) -> None:
    _, old, advantages = responses()
    new = old.clone().requires_grad_()
    weights = token_weights(LENGTHS, COUNTED, "sequence").double()
    loss = summed(name, new, old, advantages, weights)
    [gradient] = torch.autograd.grad(loss.loss_sum, new)
    torch.testing.assert_close(gradient, -weights * advantages[SAMPLE])
    assert float(loss.clip_fraction_sum) == float(loss.approx_kl_sum) == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("distance", [100.0, 1e4, -1e4])
def test_ratios_beyond_any_float_leave_everything_finite(name: str, distance: float) -> None:
    _, old, advantages = responses()
    for sign in (1.0, -1.0):
        new = (old + distance).requires_grad_()
        weights = token_weights(LENGTHS, COUNTED, "token").double()
        loss = summed(name, new, old, sign * advantages.abs(), weights)
        [gradient] = torch.autograd.grad(loss.loss_sum, new)
        assert all(value.isfinite() for value in vars(loss).values())
        assert gradient.isfinite().all()


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_clips() -> None:
    new, old = torch.tensor([0.5], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = {}
    for name in ("ppo", "cispo"):
        loss = policy_loss(new, old, one, one, settings(name))
        [gradient] = torch.autograd.grad(loss.loss_sum, new)
        found[name] = (float(gradient), float(loss.clip_fraction_sum))
    assert found == {"ppo": (0.0, 1.0), "cispo": (-1.25, 1.0)}


def test_a_loss_by_sequence_refuses_to_do_without_their_ratios() -> None:
    new, old, advantages = responses()
    with pytest.raises(ValueError, match="'gspo' needs the ratios of sequences"):
        policy_loss(new, old, advantages[SAMPLE], torch.ones_like(old), settings("gspo"))


def test_the_constant_normalizer_counts_responses_and_not_tokens() -> None:
    weights = token_weights(LENGTHS, COUNTED, "constant")
    shares = normalizer_weights(weights, LENGTHS, "constant", MAX_TOKENS)
    assert float(shares.sum()) == pytest.approx(4 * MAX_TOKENS)
    assert weights.tolist() == COUNTED.tolist()
    assert torch.equal(normalizer_weights(weights, LENGTHS, "token", MAX_TOKENS), weights)
