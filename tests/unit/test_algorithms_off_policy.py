"""Importance weights: by token and by sequence, bounded, and how much the samples are worth under them."""

import math

import pytest
import torch

from rlhf_ray.algorithms.off_policy import (
    effective_sample_fraction,
    importance_log_ratios,
    importance_shares,
    importance_sums,
    importance_weights,
)
from rlhf_ray.config.algorithm import ImportanceSettings

LENGTHS = torch.tensor([3, 1, 4])
ACTIVE = torch.tensor([True, False, True, True, True, True, True, False])


def log_ratios(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Proximal and behaviour log-probs, with garbage where no token counts."""
    proximal, noise = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    garbage = torch.where(ACTIVE, 0.0, 1e9)
    return proximal - garbage, proximal + 0.8 * noise + garbage


def test_the_default_is_truncation_by_token_and_carries_no_gradient() -> None:
    learner = torch.log(torch.tensor([0.5, 0.2, 0.9])).requires_grad_()
    engine = torch.log(torch.tensor([0.5, 0.4, 0.1]))
    found = importance_weights(
        importance_log_ratios(learner, engine, torch.ones(3, dtype=torch.bool)), ImportanceSettings()
    )
    assert found.used.tolist() == pytest.approx([1.0, 0.5, 2.0])
    assert found.plain.tolist() == pytest.approx([1.0, 0.5, 9.0])
    assert found.truncated.tolist() == [False, False, True]
    assert not found.used.requires_grad


def test_a_sequence_weighs_the_product_of_its_active_tokens_ratios() -> None:
    proximal, behaviour = log_ratios()
    found = importance_log_ratios(proximal, behaviour, ACTIVE, LENGTHS).exp()
    start = 0
    for length in LENGTHS.tolist():
        tokens = [t for t in range(start, start + length) if ACTIVE[t]]
        product = math.prod(math.exp(float(proximal[t] - behaviour[t])) for t in tokens)
        assert found[start : start + length].tolist() == pytest.approx([product] * length, rel=1e-12)
        start += length


@pytest.mark.parametrize("sequences", [None, LENGTHS])
def test_a_sequence_or_token_outside_the_mask_weighs_nothing_and_is_counted_once(
    sequences: torch.Tensor | None,
) -> None:
    proximal, behaviour = log_ratios()
    ratios = importance_log_ratios(proximal, behaviour, ACTIVE, sequences)
    shares = importance_shares(ACTIVE, sequences)
    found = importance_weights(ratios, ImportanceSettings(truncate=1.2, mask=(0.6, 1.9)))
    sums = importance_sums(found, shares)
    if sequences is None:
        units = [float(ratio.exp()) for ratio, active in zip(ratios, ACTIVE, strict=True) if active]
    else:
        units = [float(ratios[start].exp()) for start in (0, 3, 4)]
    masked = [weight for weight in units if not 0.6 <= weight <= 1.9]
    truncated = [weight for weight in units if 1.2 < weight <= 1.9]
    assert masked, "nothing is proved otherwise"
    assert float(sums.count) == pytest.approx(len(units))
    assert float(sums.masked) == pytest.approx(len(masked))
    assert float(sums.truncated) == pytest.approx(len(truncated))
    assert float(sums.plain) == pytest.approx(sum(units))
    assert float(sums.square) == pytest.approx(sum(weight**2 for weight in units))
    expected = [0.0 if not 0.6 <= w <= 1.9 else min(w, 1.2) for w in ratios.exp().tolist()]
    assert found.used.tolist() == pytest.approx(expected)


def test_the_effective_sample_fraction_is_1_for_equal_weights_and_one_nth_for_a_single_one() -> None:
    def fraction(weights: list[float]) -> float | None:
        return effective_sample_fraction(len(weights), sum(weights), sum(weight**2 for weight in weights))

    assert fraction([3.0] * 5) == pytest.approx(1.0)
    assert fraction([0.0, 0.0, 7.0, 0.0]) == pytest.approx(0.25)
    assert fraction([1.0, 2.0]) == pytest.approx(9 / 10)
    assert fraction([]) is None


def test_the_effective_sample_fraction_of_log_normal_weights() -> None:
    """E[w]² / E[w²] = exp(−σ²) for log w of variance σ²."""
    ratios = 0.6 * torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    active = torch.ones(len(ratios), dtype=torch.bool)
    sums = importance_sums(importance_weights(ratios, ImportanceSettings()), importance_shares(active))
    found = effective_sample_fraction(float(sums.count), float(sums.plain), float(sums.square))
    assert found == pytest.approx(math.exp(-(0.6**2)), abs=0.005)


def test_weights_beyond_any_float_stay_finite_where_they_are_summed() -> None:
    found = importance_weights(torch.tensor([1e4, -1e4]), ImportanceSettings())
    assert found.used.tolist() == [2.0, 0.0]
    assert found.plain.isfinite().all()
    assert found.plain.square().isfinite().all()


def test_weights_within_the_bounds_are_unbiased() -> None:
    """Without a bound that is reached, Σ w f estimates the mean of f under the proximal policy, not the behaviour's."""
    behaviour, proximal = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    values = torch.tensor([1.0, -2.0, 5.0]).double()
    weights = importance_weights((proximal / behaviour).log(), ImportanceSettings(truncate=3.0)).used
    assert float((behaviour * weights * values).sum()) == pytest.approx(float((proximal * values).sum()))
