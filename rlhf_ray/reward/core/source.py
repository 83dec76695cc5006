"""Where a run's rewards come from: read and checked before anything starts, then a constructor of scorers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import SecretStr

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.function_process import FunctionProcess
from rlhf_ray.reward.core.function_scorer import FunctionScorer
from rlhf_ray.reward.core.protocol import Conversation, Scorer
from rlhf_ray.reward.core.remote_scorer import RemoteScorer, check_reward_service, service_token
from rlhf_ray.reward.core.scorer import Place, RewardScorer
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.rollout import RewardColumn, Rollout


@dataclass(frozen=True)
class RewardSource:
    """A reward model here, a service, or a function.

    Attributes:
        key: of its section in the configuration, such as `reward` or `reward.1`.
        texts: how the model is shown text; None where no model of this run scores.
        version: of the model or function, as far as it is known before the run; None of a service.
    """

    settings: RewardSettings
    key: str
    texts: RewardTexts | None = None
    version: str | None = None

    @classmethod
    def read(cls, settings: RewardSettings, key: str = "reward") -> RewardSource:
        """Read the model's directory, ask whether the service is there, or import the function in a process that ends
        at once.

        Raises:
            BadInput: there is no such model, service or function, or the release gate refused the model.
        """
        if settings.function is not None:
            # Its traceback would be a second answer to a wrong setting.
            where, folders = f"{key}.function", [os.getcwd()]
            with FunctionProcess(settings.function, folders, where, settings.env, silent=True) as process:
                return cls(settings, key, version=process.version)
        if settings.url is not None:
            check_reward_service(settings, key)
            return cls(settings, key)
        texts = RewardTexts.read(settings.model, settings.max_length, f"{key}.model", key)
        if texts.card is not None and texts.card.released is False and settings.require_release:
            raise BadInput(
                f"{key}.model",
                f"'{settings.model}' was refused by the release gate ({texts.card.refusals[0]})",
                f"a released reward model, or {key}.require_release: false",
            )
        return cls(settings, key, texts, texts.card.version if texts.card else None)

    @property
    def card(self) -> RewardModelCard | None:
        """Of the model; None where there is none, or a service keeps its own."""
        return None if self.texts is None else self.texts.card

    def check_prompts(self, conversations: Iterable[Sequence[dict[str, Any]]]) -> None:
        """See that the model can be shown chat messages; services and functions have their own ways.

        Raises:
            BadInput: its chat template does not take them.
        """
        for messages in conversations if self.texts is not None else ():
            assert self.texts is not None
            try:
                self.texts.encode_turn(messages, "Yes.")
            except RowError as problem:
                raise BadInput(
                    f"{self.key}.model",
                    f"'{self.settings.model}' cannot be shown the prompts, which are chat messages: {problem.found}",
                    problem.allowed,
                ) from None

    def constructor(self, policy_model: str, place: Place | None = None) -> Callable[[], Scorer]:
        """Makes a scorer, in whatever process it is called.

        Args:
            policy_model: whose tokenizer decodes the responses.
            place: of a model that is spread over ranks.
        """
        make: Callable[[], Scorer]
        if self.settings.function is not None:
            # The processes of the cluster may have been started elsewhere.
            make = partial(FunctionScorer, self.settings, policy_model, [os.getcwd()])
        elif self.settings.url is not None:
            # The token is read here: the processes of the cluster may have neither the file nor the variable.
            token = service_token(self.settings.token_file, self.key)
            make = partial(RemoteScorer, self.settings, policy_model, None if token is None else SecretStr(token))
        else:
            make = partial(RewardScorer, self.settings, policy_model, place)
        return partial(TimedScorer, make)


class TimedScorer:
    """A scorer of any kind whose columns say how long they took.

    Args:
        make: the scorer.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._scorer = make()

    def score(self, rollout: Rollout, prompts: dict[int, Conversation]) -> RewardColumn:
        """The scorer's own column, with its time."""
        started = time.monotonic()
        column = self._scorer.score(rollout, prompts)
        return replace(column, time_s=time.monotonic() - started)

    def set_aside(self, rollout: Rollout, prompts: dict[int, Conversation], cause: str) -> RewardColumn:
        """No scores for a shard that no process survives: asked for by the runtime, in place of another attempt."""
        return RewardColumn(np.full(rollout.num_samples, math.nan), (cause,) * rollout.num_samples, "")
