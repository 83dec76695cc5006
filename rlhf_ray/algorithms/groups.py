"""Dynamic sampling: which prompts of a step are trained on, where more are sampled than are needed.

Responses that all have the same score say nothing about each other, and DAPO (Yu et al. 2025, section 3.2) goes on
sampling until it has a full step without such prompts. Here a step samples `sampling.spare_prompts` more than it trains
on, and takes the first ones in the order of their draw whose scores differ. So it is known before a step begins what is
sampled in it, and with which weights: a second round would have to wait for scores, for the longest response once more,
and for weights that the engines no longer have. Prompts come in the run's order, and none is left out of it: a spare
prompt is sampled like every other, and counted if it was not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupChoice:
    """The groups (prompts) of a step that are trained on.

    Attributes:
        places: theirs among the step's prompts, in the order of the draw.
        num_groups: all of the step.
        num_compared: groups of at least two scores.
        num_uniform: those of them whose scores are all equal.
        num_surplus: groups whose scores differ, but which were not needed.
        num_unfilled: groups that are trained on although they say nothing, because there were no others.
    """

    places: tuple[int, ...]
    num_groups: int
    num_compared: int
    num_uniform: int
    num_surplus: int
    num_unfilled: int

    def left_out(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of the samples that are not trained on.

        Args:
            sample_ids: of the step, in the order of the draw.
        """
        return np.delete(sample_ids.reshape(self.num_groups, -1), self.places, axis=0).ravel()


def choose_groups(scores: NDArray[np.float64], wanted: int) -> GroupChoice:
    """The first `wanted` groups whose scores differ; where there are fewer, the first of the others as well, so that
    every learner rank has its shards: first those that were compared, then those that have too few scores for it.

    Args:
        scores: `[groups, samples]` in the order of the draw, NaN where there is none. They are what the reward sources
            gave: shaping would tell apart what is equally right.
        wanted: at most as many as there are groups.
    """
    missing = np.isnan(scores)
    compared = (~missing).sum(axis=1) >= 2
    lowest = np.where(missing, np.inf, scores).min(axis=1)
    highest = np.where(missing, -np.inf, scores).max(axis=1)
    differing = compared & (lowest < highest)
    chosen = np.flatnonzero(differing)[:wanted]
    others = np.concatenate([np.flatnonzero(compared & ~differing), np.flatnonzero(~compared)])[: wanted - len(chosen)]
    return GroupChoice(
        places=tuple(np.sort(np.concatenate([chosen, others])).tolist()),
        num_groups=len(scores),
        num_compared=int(compared.sum()),
        num_uniform=int((compared & ~differing).sum()),
        num_surplus=int(differing.sum()) - len(chosen),
        num_unfilled=len(others),
    )
