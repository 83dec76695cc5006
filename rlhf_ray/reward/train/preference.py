"""The Bradley-Terry model of human comparisons: P(chosen over rejected) = σ(score of chosen − score of rejected)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def bradley_terry_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    chosen_probability: torch.Tensor,
    margin: torch.Tensor | None,
    weight: torch.Tensor,
    label_smoothing: float,
    centering: float,
) -> torch.Tensor:
    """Weighted sum over pairs of the cross-entropy between the raters' and the model's preference.

    With Δ = chosen − rejected and margin m: `−p log σ(Δ − m) − (1 − p) log σ(−Δ − m)`, which is eq. 2 of Llama 2
    (Touvron et al. 2023) for each rater, averaged over them. A margin asks for a larger gap in the direction of each
    rater's label: with p < ½ the rejected one is to lead by more, and a tie is lowest at Δ = 0 whatever the margin.
    Without one the loss is lowest at Δ = logit(p). Label smoothing replaces p by `(1 − s) p + s (1 − p)`. Centering
    adds `centering · (chosen + rejected)²` (Eisenstein et al. 2023), because comparisons determine differences only,
    and a policy needs scores that are comparable between prompts.

    Args:
        chosen_scores: `[P]`.
        rejected_scores: `[P]`.
        chosen_probability: `[P]` in [0, 1], share of raters who preferred the chosen one; 1 for a hard label.
        margin: `[P]`, in units of the score; None: 0.
        weight: `[P]`, 0 for a pair that does not count.
        label_smoothing: s in [0, 0.5).
        centering: weight of the squared sum; 0: off.

    Returns:
        A scalar, summed and not averaged: divide it by the sum of `weight` over the whole batch, on all ranks.
    """
    dtype = torch.promote_types(chosen_scores.dtype, torch.float32)
    chosen, rejected = chosen_scores.to(dtype), rejected_scores.to(dtype)
    gap, wanted = chosen - rejected, 0.0 if margin is None else margin.to(dtype)
    probability = chosen_probability.to(dtype)
    target = (1 - label_smoothing) * probability + label_smoothing * (1 - probability)
    loss = -target * F.logsigmoid(gap - wanted) - (1 - target) * F.logsigmoid(-gap - wanted)
    return (weight.to(dtype) * (loss + centering * (chosen + rejected).square())).sum()


def pair_accuracy(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """`[P]` float64: 1 where the chosen one scores higher, 0 where it scores lower, 0.5 for a tie.

    The mean is the accuracy. A tie is half right, so a model that gives everything the same score is at chance.
    """
    return 0.5 * (1 + torch.sign(chosen_scores.double() - rejected_scores.double()))
