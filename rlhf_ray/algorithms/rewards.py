"""From the reward model's scores to the rewards of tokens.

A *score* is what the reward model gave, a *shaped score* what is left of it after length shaping, whitening, clipping
and penalties, and a *reward* is what a token gets: its KL penalty, plus the shaped score at the last token.
"""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.advantages import whiten
from rlhf_ray.algorithms.segments import Moments, group_sum, last_index
from rlhf_ray.config.algorithm import AlgorithmSettings, LengthSettings


def rescale_by_length(
    scores: torch.Tensor, ok: torch.Tensor, lengths: torch.Tensor, group_ids: torch.Tensor, alpha: float
) -> torch.Tensor:
    """`[B]` positive scores divided by `1 + α · length / mean length of the group`.

    Multiplicative and relative to the group, as in GR3 (Li et al. 2026, arXiv 2603.10535): what a shorter response
    gains is a share of its score, so that a short one without merit gains nothing, as it would with a penalty that is
    subtracted. Its calibration of α is left out. Scores of 0 and below stay as they are: dividing them would reward
    length.

    Args:
        scores: `[B]`; anything where not `ok`.
        ok: `[B]` bool; the mean is over these.
        lengths: `[B]` sampled tokens.
        group_ids: `[B]` int64, equal for samples of one prompt.
        alpha: α; 0 changes nothing.
    """
    lengths = lengths.double()
    valid = ok.double()
    mean = group_sum(lengths * valid, group_ids) / group_sum(valid, group_ids).clamp(min=1)
    factor = 1 + alpha * lengths / mean.clamp(min=1)
    return torch.where(ok & (scores > 0), scores / factor, scores)


def length_penalty(lengths: torch.Tensor, settings: LengthSettings, max_response_tokens: int) -> torch.Tensor:
    """`[B]` float64, what is subtracted from a score for the response's length.

    With `penalty` p: `p · length`, or `p · |length − target|` (L1-Exact, Aggarwal & Welleck 2025, eq. 1). With
    `overlong_buffer` c: a share of `overlong_penalty` that rises linearly from 0 at `max − c` tokens to 1 at `max`, the
    soft overlong punishment of DAPO (Yu et al. 2025, eq. 13, whose third case, beyond the limit, cannot occur here).

    Args:
        lengths: `[B]` sampled tokens.
        settings: the length section.
        max_response_tokens: where responses are cut off.
    """
    tokens = lengths.double()
    penalty = settings.penalty * (tokens if settings.target is None else (tokens - settings.target).abs())
    if settings.overlong_buffer is not None:
        excess = tokens - (max_response_tokens - settings.overlong_buffer)
        penalty = penalty + settings.overlong_penalty * (excess / settings.overlong_buffer).clamp(0, 1)
    return penalty


def shape_scores(
    scores: torch.Tensor,
    ok: torch.Tensor,
    ended: torch.Tensor,
    algorithm: AlgorithmSettings,
    moments: Moments,
) -> torch.Tensor:
    """Shaped scores, in this order: whitening, clip, penalty.

    So the clip is in standard deviations where scores are whitened, and the penalty is never whitened or clipped away:
    an unfinished response always loses exactly that much.

    Args:
        scores: `[B]`; anything where not `ok`.
        ok: `[B]` bool, true where there is a score.
        ended: `[B]` bool, true where the response ended by itself.
        algorithm: `reward_whiten`, `score_clip` and `missing_eos_penalty`.
        moments: of the valid scores on all ranks.

    Returns:
        `[B]`, 0 where not `ok`.
    """
    shaped = whiten(scores, ok, moments) if algorithm.reward_whiten else scores
    if algorithm.score_clip is not None:
        shaped = shaped.clamp(-algorithm.score_clip, algorithm.score_clip)
    shaped = torch.where(ended, shaped, shaped - algorithm.missing_eos_penalty)
    return torch.where(ok, shaped, 0.0)


def token_rewards(
    shaped: torch.Tensor,
    kl: torch.Tensor,
    lengths: torch.Tensor,
    coefficient: float,
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[R]` rewards: `−β·kl` at every token, plus the shaped score at the last one (Stiennon et al. 2020).

    Args:
        shaped: `[B]` shaped scores.
        kl: `[R]` per-token KL estimates, nats.
        lengths: `[B]` response lengths.
        coefficient: β.
        sampled: `[R]` bool, tokens that the policy sampled: the score is at the last of them; None: all.
    """
    return (-coefficient * kl).index_add(0, last_index(lengths, sampled), shaped.to(kl.dtype))
