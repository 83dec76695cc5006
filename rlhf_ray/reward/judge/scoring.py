"""Pairs and their scores, by as many scorers as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.reward.core.card import ScoreAggregation
from rlhf_ray.reward.core.scorer import RewardScorer, ScoredTexts
from rlhf_ray.reward.judge.evaluation import PairScores
from rlhf_ray.reward.judge.inputs import UsedPairs
from rlhf_ray.runtime.actor_group import ActorGroup

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of the pairs that could be scored.

    Attributes:
        kept: indices of those pairs.
        failures: causes of the others, with how often.
        failed_texts: texts without a score.
        text_scores, text_lengths: `[n]` score of every different text alone, NaN where there is none, and its tokens.
    """

    scores: PairScores
    kept: tuple[int, ...]
    failures: dict[str, int]
    failed_texts: int
    text_scores: NDArray[np.float64]
    text_lengths: NDArray[np.int64]


def score_all(scorers: ActorGroup[RewardScorer], texts: Sequence[Tokens]) -> ScoredTexts:
    """Scores in the order of the texts, whatever the number of scorers; each gets texts of all lengths."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    shares = [order[replica :: len(scorers)] for replica in range(len(scorers))]
    answers = scorers.wait(
        [
            scorer.ask(RewardScorer.score_tokens, [texts[index] for index in share])
            for scorer, share in zip(scorers, shares, strict=True)
        ]
    )
    place = np.argsort(np.concatenate([np.array(share, dtype=np.int64) for share in shares]), kind="stable")
    failures = [cause for answer in answers for cause in answer.failures]
    return ScoredTexts(
        heads=np.concatenate([answer.heads for answer in answers])[place],
        scores=np.concatenate([answer.scores for answer in answers])[place],
        disagreement=np.concatenate([answer.disagreement for answer in answers])[place],
        failures=tuple(failures[index] for index in place),
        num_tokens=np.concatenate([answer.num_tokens for answer in answers])[place],
        truncated=np.concatenate([answer.truncated for answer in answers])[place],
        version=answers[0].version,
    )


def score_pairs(scorers: ActorGroup[RewardScorer], used: UsedPairs, aggregation: ScoreAggregation) -> ScoredPairs:
    """Score both sides of every pair; a text that occurs in several pairs is computed once.

    The members of an ensemble are centred within each pair, as PPO centres them within a prompt.

    Args:
        aggregation: how heads become a score; the scorers' own may not be final yet.
    """
    unique = list(dict.fromkeys([*used.chosen, *used.rejected]))
    place = {text: index for index, text in enumerate(unique)}
    scored = score_all(scorers, unique)
    scores, _ = aggregation.scores(scored.heads, scored.num_tokens)
    attributes = scored.heads.mean(axis=2)
    members = aggregation.member_scores(scored.heads) - aggregation.length_coefficient * scored.num_tokens[:, None]
    sides = np.array([[place[text] for text in side] for side in (used.chosen, used.rejected)])
    kept = np.flatnonzero(np.isfinite(scores[sides]).all(axis=0))
    chosen, rejected = sides[:, kept]
    both, pair = np.concatenate([chosen, rejected]), np.tile(np.arange(len(kept)), 2)
    in_pairs, _ = aggregation.scores(scored.heads[both], scored.num_tokens[both], pair)
    causes = [cause for cause in scored.failures if cause]
    return ScoredPairs(
        PairScores(
            chosen=in_pairs[: len(kept)],
            rejected=in_pairs[len(kept) :],
            chosen_attributes=attributes[chosen],
            rejected_attributes=attributes[rejected],
            member_differences=members[chosen] - members[rejected],
            num_tokens=scored.num_tokens[np.stack([chosen, rejected], axis=1)],
        ),
        tuple(kept.tolist()),
        {cause: causes.count(cause) for cause in dict.fromkeys(causes)},
        len(causes),
        scores,
        scored.num_tokens,
    )
