"""From the reward model's scores to the rewards of tokens.

A *score* is what the reward model gave, a *shaped score* what is left of it after whitening, clipping and the penalty
for a missing end, and a *reward* is what a token gets: its KL penalty, plus the shaped score at the last token.
"""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.advantages import whiten
from rlhf_ray.algorithms.segments import Moments, last_index
from rlhf_ray.config.algorithm import AlgorithmSettings


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


def token_rewards(shaped: torch.Tensor, kl: torch.Tensor, lengths: torch.Tensor, coefficient: float) -> torch.Tensor:
    """`[R]` rewards: `−β·kl` at every token, plus the shaped score at the last one (Stiennon et al. 2020).

    Args:
        shaped: `[B]` shaped scores.
        kl: `[R]` per-token KL estimates, nats.
        lengths: `[B]` response lengths.
        coefficient: β.
    """
    return (-coefficient * kl).index_add(0, last_index(lengths), shaped.to(kl.dtype))
