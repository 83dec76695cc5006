"""Correction for responses that were sampled by another policy than the one the ratio is taken to.

Three policies play a part (decoupled PPO, Hilton et al. 2022, section 2): the one in training, the *proximal* one that
clipping keeps it near (the learner's weights at the start of the step), and the *behaviour* policy that sampled (the
engine, perhaps with older weights). The loss is multiplied by `w = π_proximal / π_behaviour`, without gradient. By
token, w is the ratio of that token (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"). By sequence, it is the product over the tokens: the only unbiased weight
of a response, and what Liu & Li 2025 ("When speed kills stability") and verl call sequence-level. A geometric mean has
less variance but is no importance weight; GSPO has one, in its ratio. What bounds the variance here is truncation or
a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_ray.algorithms.losses import MAX_LOG_RATIO
from rlhf_ray.algorithms.segments import segment_counts, segment_ids, segment_sum
from rlhf_ray.config.algorithm import ImportanceSettings


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights of some tokens, without gradient; `[R]` each.

    Attributes:
        used: what the loss is multiplied by: truncated, and 0 where masked.
        plain: before truncation and mask, float64, with log-ratios within ± `MAX_LOG_RATIO`.
        truncated: bool, where `used` is smaller than w because of the cap.
        masked: bool, where w is outside the mask's bounds.
    """

    used: torch.Tensor
    plain: torch.Tensor
    truncated: torch.Tensor
    masked: torch.Tensor


@dataclass(frozen=True)
class ImportanceSums:
    """Sums over tokens or sequences, float64 scalars; they add up over micro-batches and ranks.

    Attributes:
        count: of tokens, or of sequences.
        plain: Σ w.
        square: Σ w².
        truncated: how many.
        masked: how many.
    """

    count: torch.Tensor | float = 0.0
    plain: torch.Tensor | float = 0.0
    square: torch.Tensor | float = 0.0
    truncated: torch.Tensor | float = 0.0
    masked: torch.Tensor | float = 0.0


def importance_log_ratios(
    proximal_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    active: torch.Tensor,
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[R]` log w of each token: its own, or the sum over its sequence. Without gradient.

    Args:
        proximal_logprobs: `[R]`.
        behaviour_logprobs: `[R]` as the engine gave them.
        active: `[R]` bool; the others may hold anything, and have no part in a sum.
        sequences: `[S]` lengths of the whole sequences that the tokens make up; None: by token.
    """
    log_ratios = torch.where(active, proximal_logprobs - behaviour_logprobs, 0.0).detach()
    if sequences is None:
        return log_ratios
    return segment_sum(log_ratios, sequences)[segment_ids(sequences)]


def importance_weights(log_ratios: torch.Tensor, settings: ImportanceSettings) -> ImportanceWeights:
    """`min(w, truncate)`, and 0 for w outside `mask`.

    A masked token or sequence still counts in what the loss is divided by: leaving some out makes the step smaller, not
    the others weigh more.

    Args:
        log_ratios: `[R]` from `importance_log_ratios`.
        settings: the importance section.
    """
    weights = log_ratios.detach().exp()
    truncated = masked = torch.zeros_like(weights, dtype=torch.bool)
    used = weights
    if settings.truncate is not None:
        used, truncated = weights.clamp(max=settings.truncate), weights > settings.truncate
    if settings.mask is not None:
        low, high = settings.mask
        masked = (weights < low) | (weights > high)
        used, truncated = torch.where(masked, 0.0, used), truncated & ~masked
    plain = log_ratios.detach().double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ImportanceWeights(used, plain, truncated, masked)


def importance_sums(weights: ImportanceWeights, shares: torch.Tensor) -> ImportanceSums:
    """Sums for `effective_sample_fraction` and the shares of what was truncated or masked.

    Args:
        weights: `[R]`.
        shares: `[R]` from `importance_shares`.
    """
    shares = shares.double()
    return ImportanceSums(
        count=shares.sum(),
        plain=(shares * weights.plain).sum(),
        square=(shares * weights.plain.square()).sum(),
        truncated=(shares * weights.truncated).sum(),
        masked=(shares * weights.masked).sum(),
    )


def importance_shares(active: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """`[R]` float64: what each token adds to a count of tokens, or of sequences; 0 where not `active`.

    Arguments as for `importance_log_ratios`.
    """
    if sequences is None:
        return active.double()
    return active.double() / segment_counts(active, sequences).clamp(min=1)[segment_ids(sequences)]


def effective_sample_fraction(count: float, plain: float, square: float) -> float | None:
    """Effective sample size as a share, `(Σ w)² / (n Σ w²)` (Kish 1965): 1 for equal weights, 1/n if one has it all.

    Of the weights before truncation and mask, because it is to say how far apart the policies are, not how well that is
    hidden. None without weights.
    """
    return plain**2 / (count * square) if count and square else None
