"""What everybody else knows of a reward: it is scored by a `Scorer`, whatever is behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_ray.rollout import RewardColumn, Rollout


@dataclass(frozen=True)
class Conversation:
    """A prompt as its row had it: text, or chat messages.

    Attributes:
        text: of the prompt; chat messages as the policy's template renders them.
        messages: the chat messages, or None for a text.
        label: the row's `label`, such as the right answer, or None. For scorers that check responses; a reward model
            has no use for it.
    """

    text: str
    messages: tuple[dict[str, Any], ...] | None = None
    label: object | None = None


class Scorer(Protocol):
    """Scores rollouts. One kind has the model in its process (`RewardScorer`), another asks a service
    (`RemoteScorer`), a third calls a user's function (`FunctionScorer`)."""

    def score(self, rollout: Rollout, prompts: dict[int, Conversation]) -> RewardColumn:
        """A score, or the cause why there is none, for every sample of a shard.

        Args:
            prompts: of the shard, by prompt id.
        """
        ...
