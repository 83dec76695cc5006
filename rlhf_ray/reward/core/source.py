"""Where a run's rewards come from: read and checked before anything starts, then a constructor of scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.protocol import Scorer
from rlhf_ray.reward.core.remote_scorer import RemoteScorer, check_reward_service, service_token
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.core.texts import RewardTexts


@dataclass(frozen=True)
class RewardSource:
    """A reward model here, or a service.

    Attributes:
        texts: how the model is shown text; None where a service scores.
    """

    settings: RewardSettings
    texts: RewardTexts | None

    @classmethod
    def read(cls, settings: RewardSettings) -> RewardSource:
        """Read the model's directory, or ask whether the service is there.

        Raises:
            BadInput: there is no such model or service, or the release gate refused the model.
        """
        if settings.url is not None:
            check_reward_service(settings)
            return cls(settings, None)
        texts = RewardTexts.read(settings.model, settings.max_length)
        if texts.card is not None and texts.card.released is False and settings.require_release:
            raise BadInput(
                "reward.model",
                f"'{settings.model}' was refused by the release gate ({texts.card.refusals[0]})",
                "a released reward model, or reward.require_release: false",
            )
        return cls(settings, texts)

    @property
    def card(self) -> RewardModelCard | None:
        """Of the model; None where there is none, or a service keeps its own."""
        return None if self.texts is None else self.texts.card

    def check_prompts(self, conversations: Iterable[Sequence[dict[str, Any]]]) -> None:
        """See that the model can be shown chat messages; a service has its own ways.

        Raises:
            BadInput: its chat template does not take them.
        """
        for messages in conversations if self.texts is not None else ():
            assert self.texts is not None
            try:
                self.texts.encode_turn(messages, "Yes.")
            except RowError as problem:
                raise BadInput(
                    "reward.model",
                    f"'{self.settings.model}' cannot be shown the prompts, which are chat messages: {problem.found}",
                    problem.allowed,
                ) from None

    def constructor(self, policy_model: str) -> Callable[[], Scorer]:
        """Makes a scorer, in whatever process it is called.

        Args:
            policy_model: whose tokenizer decodes the responses.
        """
        if self.settings.url is None:
            return partial(RewardScorer, self.settings, policy_model)
        # The token is read here: the processes of the cluster may have neither the file nor the variable.
        return partial(RemoteScorer, self.settings, policy_model, service_token(self.settings.token_file))
