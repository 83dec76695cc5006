"""The Bradley-Terry loss against its closed form."""

import math

import pytest
import torch

from rlhf_ray.reward.train.preference import bradley_terry_loss, pair_accuracy


def pairs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, 30, dtype=torch.float64, generator=generator) * 2
    probability, margin, weight = torch.rand(3, 30, dtype=torch.float64, generator=generator)
    return chosen.requires_grad_(), rejected.requires_grad_(), probability, margin, weight


def loss_of(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    probability: float | torch.Tensor = 1.0,
    margin: torch.Tensor | None = None,
    weight: float | torch.Tensor = 1.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> torch.Tensor:
    return bradley_terry_loss(
        chosen,
        rejected,
        chosen_probability=torch.as_tensor(probability, dtype=chosen.dtype).expand_as(chosen),
        margin=margin,
        weight=torch.as_tensor(weight, dtype=chosen.dtype).expand_as(chosen),
        label_smoothing=label_smoothing,
        centering=centering,
    )


def test_hard_labels_give_the_plain_loss() -> None:
    loss = loss_of(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-2)) + math.log(2), rel=1e-6)


def test_a_margin_is_subtracted_from_the_gap() -> None:
    loss = loss_of(torch.tensor([2.0]), torch.tensor([0.5]), margin=torch.tensor([1.0]))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)


def test_gradient_has_its_closed_form() -> None:
    chosen, rejected, probability, margin, weight = pairs()
    loss_of(chosen, rejected, probability, margin, weight, label_smoothing=0.1, centering=0.3).backward()
    target = 0.9 * probability + 0.1 * (1 - probability)
    gap = chosen - rejected
    pull = (1 - target) * torch.sigmoid(margin + gap) - target * torch.sigmoid(margin - gap)
    center = 2 * 0.3 * (chosen + rejected)
    torch.testing.assert_close(chosen.grad, (weight * (pull + center)).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(rejected.grad, (weight * (center - pull)).detach(), atol=1e-12, rtol=0)


def test_a_soft_label_is_the_average_of_its_raters() -> None:
    chosen, rejected, _, margin, _ = pairs()
    split = loss_of(chosen, rejected, 1.0, margin, 0.75) + loss_of(rejected, chosen, 1.0, margin, 0.25)
    torch.testing.assert_close(loss_of(chosen, rejected, 0.75, margin), split)


def test_swapping_a_pair_and_its_label_changes_nothing() -> None:
    chosen, rejected, probability, margin, _ = pairs()
    swapped = loss_of(rejected, chosen, 1 - probability, margin, centering=0.1, label_smoothing=0.2)
    torch.testing.assert_close(
        loss_of(chosen, rejected, probability, margin, centering=0.1, label_smoothing=0.2), swapped
    )


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_a_margin_widens_the_gap_in_the_direction_of_the_label_and_leaves_ties_alone(margin: float) -> None:
    gaps = torch.linspace(-8, 8, 16001, dtype=torch.float64)

    def best_gap(probability: float, margin: float) -> float:
        chosen = gaps.clone().requires_grad_()
        loss_of(chosen, torch.zeros_like(gaps), probability, torch.full_like(gaps, margin)).backward()
        assert chosen.grad is not None
        return float(gaps[chosen.grad.abs().argmin()])

    assert best_gap(0.5, margin) == pytest.approx(0, abs=1e-3)
    for probability in (0.6, 0.75, 0.9):
        assert best_gap(probability, 0.0) == pytest.approx(math.log(probability / (1 - probability)), abs=1e-3)
        assert best_gap(probability, margin) > best_gap(probability, 0.0) + 0.01
        assert best_gap(1 - probability, margin) == pytest.approx(-best_gap(probability, margin), abs=2e-3)


def test_half_precision_scores_are_compared_in_float32() -> None:
    chosen, rejected = torch.tensor([8.0], dtype=torch.bfloat16), torch.tensor([0.03125], dtype=torch.bfloat16)
    loss = loss_of(chosen, rejected)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log1p(math.exp(-7.96875)), rel=1e-4)


def test_accuracy_counts_a_tie_as_half() -> None:
    assert pair_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
