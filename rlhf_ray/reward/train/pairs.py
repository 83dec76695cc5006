"""Comparisons as the learner takes them: tokens, labels, and weights for the heads of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_ray.config.reward_model import EnsembleSettings
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.judge.inputs import UsedPairs, attribute_label


@dataclass(frozen=True)
class EncodedPair:
    """One comparison as tokens.

    Attributes:
        chosen, rejected: token ids of the whole texts.
        probabilities: soft label of each attribute, the preference first; None where the row has none.
        margin: by how much more the preference's scores should differ, or None.
        weight: in the loss.
        member_weights: further weight for each head of an ensemble.
    """

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    probabilities: tuple[float | None, ...]
    margin: float | None
    weight: float
    member_weights: tuple[float, ...]


def encoded_pairs(
    used: UsedPairs, attributes: tuple[str, ...], ensemble: EnsembleSettings, seed: int
) -> list[EncodedPair]:
    """Pairs as the learner takes them.

    Args:
        attributes: heads, the preference first.
        seed: keys the bootstrap weights; another one for each independent member.
    """
    heads = ensemble.num_heads
    weights = np.ones((len(used.pairs), heads))
    if ensemble.members > 1 and ensemble.bootstrap:
        draws = [keyed_generator(seed, "bootstrap", head).poisson(1.0, len(used.pairs)) for head in range(heads)]
        weights = np.stack(draws, axis=1).astype(np.float64)
    return [
        EncodedPair(
            chosen=chosen,
            rejected=rejected,
            probabilities=(pair.chosen_probability, *(attribute_label(pair, name) for name in attributes[1:])),
            margin=pair.margin,
            weight=pair.weight,
            member_weights=tuple(own.tolist()),
        )
        for pair, chosen, rejected, own in zip(used.pairs, used.chosen, used.rejected, weights, strict=True)
    ]
