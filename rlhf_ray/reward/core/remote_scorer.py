"""Scoring responses with a reward service, in the place of a reward model of the run's own.

Texts are sent, never token ids: the service's tokenizer is its own affair. A text that cannot be scored is a failure in
its place, as with `RewardScorer`; a service that cannot be reached is an infrastructure failure, after the client has
tried for as long as the settings allow. No failure is ever a number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import SecretStr

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.client import PromptResponse, RewardClient
from rlhf_ray.reward.client.errors import RewardServiceError, Unauthorized
from rlhf_ray.reward.client.schema import ServedModel
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.texts import ResponseReader
from rlhf_ray.rollout import RewardColumn, Rollout
from rlhf_ray.waiting import waiting

TOKEN_VARIABLE = "RLHF_RAY_TOKEN"
_CHECK_TIMEOUT_S = 30.0


class RemoteScorer:
    """One caller of a reward service, with the method that the loop calls of `RewardScorer`.

    Args:
        settings: where the service is and which of its models scores.
        policy_model: whose tokenizer decodes the responses.
        token: the service's bearer token, or None; no log that shows what a scorer is made of has it.

    Raises:
        RewardServiceError: the service cannot be reached or refuses.
        BadInput: it has no such model.
    """

    def __init__(self, settings: RewardSettings, policy_model: str, token: SecretStr | None = None) -> None:
        assert settings.url is not None, "a remote scorer has a service"
        self._settings = settings
        self._responses = ResponseReader(policy_model)
        self._client = RewardClient(
            settings.url,
            None if token is None else token.get_secret_value(),
            timeout_s=settings.timeout_s,
            # An attempt that is lost without a word leaves time for two more.
            request_timeout_s=settings.timeout_s / 3,
            retries=None,
            max_items=settings.batch_size,
        )
        model = _chosen(self._client.models(), settings)
        self._several_members = model.num_members > 1
        self.version = model.version

    def score(self, rollout: Rollout, prompts: Mapping[int, Conversation]) -> RewardColumn:
        """A score, or the cause why there is none, for every sample of a shard.

        Args:
            prompts: of the shard, by prompt id.

        Raises:
            RewardServiceError: the service did not answer in time, or its answer cannot be used.
        """
        scores, disagreement = (np.full(rollout.num_samples, math.nan) for _ in range(2))
        failures = [""] * rollout.num_samples
        items: dict[int, PromptResponse] = {}
        for index in range(rollout.num_samples):
            try:
                items[index] = self._item(rollout, index, prompts[int(rollout.prompt_ids[index])])
            except RowError as problem:
                failures[index] = problem.found
        with waiting():
            answer = self._client.reward_each(
                list(items.values()), self._settings.model or None, on_too_long=self._settings.on_too_long
            )
        num_truncated = 0
        if answer.model is not None:
            # A service may take up a new version while the run goes on.
            self.version = answer.model.version
        for index, outcome in zip(items, answer.outcomes, strict=True):
            if isinstance(outcome, RewardServiceError):
                failures[index] = outcome.message or type(outcome).__name__
                continue
            scores[index], disagreement[index] = outcome.score, outcome.disagreement
            num_truncated += outcome.truncated
        if answer.model is not None and self._settings.apply_temperature:
            scores, disagreement = scores / answer.model.temperature, disagreement / answer.model.temperature
        return RewardColumn(
            scores, tuple(failures), self.version, num_truncated, disagreement if self._several_members else None
        )

    def _item(self, rollout: Rollout, index: int, prompt: Conversation) -> PromptResponse:
        # The service's protocol has no place for the prompt's label.
        response = self._responses.text(rollout, index)
        return PromptResponse(prompt.text if prompt.messages is None else prompt.messages, response)


def service_token(token_file: str | None, key: str = "reward") -> str | None:
    """The token of the file, or of the environment; None where there is neither.

    Args:
        key: of the section that names the file, for messages.

    Raises:
        BadInput: the file cannot be read, or is empty.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        where = f"{key}.token_file"
        raise BadInput(where, f"'{token_file}' cannot be read ({error})", "a file with a token") from None
    if not token:
        raise BadInput(f"{key}.token_file", f"'{token_file}' is empty", "a file with a token")
    return token


def check_reward_service(settings: RewardSettings, key: str = "reward") -> None:
    """Ask the service for its models, before anything starts.

    Args:
        key: of the section that names the service, for messages.

    Raises:
        BadInput: it cannot be reached, refuses the token, is no reward service, or has no such model.
    """
    assert settings.url is not None, "there is a service to check"
    timeout_s = min(settings.timeout_s, _CHECK_TIMEOUT_S)
    token = service_token(settings.token_file, key)
    with RewardClient(settings.url, token, timeout_s=timeout_s, retries=2) as client:
        try:
            models = client.models()
        except Unauthorized:
            raise BadInput(
                f"{key}.url",
                f"the service at {settings.url} {'refuses the' if token else 'wants a'} token",
                f"its token in {key}.token_file or {TOKEN_VARIABLE}",
            ) from None
        except RewardServiceError as error:
            raise BadInput(
                f"{key}.url", f"{settings.url} does not answer as a reward service ({error})", "`rlhf-ray serve-rm`"
            ) from None
    _chosen(models, settings, key)


def _chosen(models: tuple[ServedModel, ...], settings: RewardSettings, key: str = "reward") -> ServedModel:
    """The model that will score; where the service chooses, the one with the largest share."""
    for model in models:
        if not settings.model or settings.model in (model.id, model.version):
            return model
    names = ", ".join(model.id for model in models) or "none"
    raise BadInput(f"{key}.model", f"the service at {settings.url} has no model '{settings.model}'", f"one of {names}")
