"""Scoring responses with a user's function, in the place of a reward model.

A call that raises, hangs, ends its process, or returns anything but one finite number a sample is a failure of the
samples of that call, each with its cause. No failure is ever a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.reward.core.function_child import Batch, Failed, Outcome
from rlhf_ray.reward.core.function_process import FunctionProcess
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.texts import ResponseReader
from rlhf_ray.rollout import FINISH_LENGTH, RewardColumn, Rollout
from rlhf_ray.waiting import waiting

MAX_LOST_PROCESSES = 3
"""In one shard: a function that always hangs would otherwise take its whole deadline for every call."""


class FunctionScorer:
    """One replica of a function, with the method that the loop calls of `RewardScorer`.

    Args:
        settings: which function, how many samples a call has, and how long it may take.
        policy_model: whose tokenizer decodes the responses.
        search_path: folders to import the function from before all others.

    Raises:
        BadInput: the function cannot be imported or called.
    """

    def __init__(self, settings: RewardSettings, policy_model: str, search_path: Sequence[str] = ()) -> None:
        assert settings.function is not None, "a function scorer has a function"
        self._settings = settings
        self._responses = ResponseReader(policy_model)
        self._process = FunctionProcess(settings.function, search_path)

    def score(self, rollout: Rollout, prompts: Mapping[int, Conversation]) -> RewardColumn:
        """A score, or the cause why there is none, for every sample of a shard.

        Args:
            prompts: of the shard, by prompt id.
        """
        outcomes: list[Outcome] = [Failed("")] * rollout.num_samples
        texts: dict[int, str] = {}
        for index in range(rollout.num_samples):
            try:
                texts[index] = self._responses.text(rollout, index)
            except RowError as problem:
                outcomes[index] = Failed(problem.found)
        readable, size, lost = list(texts), self._settings.batch_size, 0
        for first in range(0, len(readable), size):
            chosen = readable[first : first + size]
            if lost < MAX_LOST_PROCESSES:
                batch = _batch(rollout, prompts, texts, chosen)
                with waiting():
                    scored = self._process.call(batch, self._settings.timeout_s)
                lost += not self._process.is_running
            else:
                cause = f"not called: {self._settings.name} hung or ended its process {lost} times in this shard"
                scored = [Failed(cause)] * len(chosen)
            for index, outcome in zip(chosen, scored, strict=True):
                outcomes[index] = outcome
        return RewardColumn(
            np.array([math.nan if isinstance(outcome, Failed) else outcome for outcome in outcomes]),
            tuple(outcome.cause if isinstance(outcome, Failed) else "" for outcome in outcomes),
            self._process.version,
        )


def _batch(
    rollout: Rollout, prompts: Mapping[int, Conversation], texts: Mapping[int, str], chosen: Sequence[int]
) -> Batch:
    asked = [prompts[int(rollout.prompt_ids[index])] for index in chosen]
    return Batch(
        prompts=[prompt.text if prompt.messages is None else list(prompt.messages) for prompt in asked],
        responses=[texts[index] for index in chosen],
        labels=[prompt.label for prompt in asked],
        num_tokens=[int(rollout.response_lengths[index]) for index in chosen],
        truncated=[bool(rollout.finish_reasons[index] == FINISH_LENGTH) for index in chosen],
    )
