"""Our own routes: typed, with everything that is known of a score."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import StrictBool, StrictInt

from rlhf_ray.reward.client.schema import AnsweringModel, Preference, PreferenceAnswer, Reward, RewardAnswer
from rlhf_ray.reward.client.service_errors import ApiError
from rlhf_ray.reward.serve.exchange import ModelInfo, ScoreInput, Service
from rlhf_ray.reward.serve.wire.bodies import Several, Strict, read_body, scored, sigmoid
from rlhf_ray.reward.serve.wire.rollouts import Message, conversation, sticky_key, turn

OnTooLong = Literal["default", "fail", "truncate"]


class Turn(Strict):
    """A prompt, as text or chat messages, and its response."""

    prompt: str | Several[Message]
    response: str


class Conversation(Strict):
    """Chat messages that end with the response."""

    messages: Several[Message]


class Text(Strict):
    """Prompt and response as one text.

    Attributes:
        templated: a chat template has written the special tokens already.
    """

    text: str
    templated: StrictBool = False


class Tokens(Strict):
    """Token ids as the model is to be given them."""

    token_ids: Several[StrictInt]


class RewardRequest(Strict):
    """`/v1/reward`."""

    items: Several[Turn | Conversation | Text | Tokens]
    model: str | None = None
    on_too_long: OnTooLong = "default"


class ResponsePair(Strict):
    """A prompt and two responses."""

    prompt: str | Several[Message]
    response_a: str
    response_b: str


class PreferenceRequest(Strict):
    """`/v1/preference`."""

    items: Several[ResponsePair]
    model: str | None = None
    on_too_long: OnTooLong = "default"


def routes(service: Service) -> APIRouter:
    """`/v1/reward` and `/v1/preference`."""
    router = APIRouter(tags=["rlhf_ray"])

    @router.post("/v1/reward", response_model=RewardAnswer)
    async def reward(request: Request) -> Response:
        """Score, attributes, disagreement, tokens and whether a text was cut, for each item."""
        body = await read_body(request, RewardRequest)
        inputs = [_input(item, body.on_too_long) for item in body.items]
        first = body.items[0] if body.items else None
        sticky = sticky_key(first.prompt) if isinstance(first, Turn) else None
        answer = await service.score(inputs, model=body.model, sticky=sticky)
        rewards = tuple(Reward.model_construct(**vars(score)) for score in answer.scores)
        return scored(RewardAnswer(model=_model(answer.model), items=rewards), answer)

    @router.post("/v1/preference", response_model=PreferenceAnswer)
    async def preference(request: Request) -> Response:
        """The calibrated probability σ((a − b) / temperature) that people prefer response a, and both scores."""
        body = await read_body(request, PreferenceRequest)
        inputs = [
            _with(turn(item.prompt, response), body.on_too_long)
            for item in body.items
            for response in (item.response_a, item.response_b)
        ]
        sticky = sticky_key(body.items[0].prompt) if body.items else None
        try:
            answer = await service.score(inputs, model=body.model, sticky=sticky)
        except ApiError as error:
            # The service counts texts, and an item has two.
            index = None if error.index is None else error.index // 2
            raise ApiError(error.type, error.message, index=index, retry_after_s=error.retry_after_s) from None
        preferences = tuple(
            Preference.model_construct(
                probability=sigmoid((a.score - b.score) / answer.model.temperature),
                score_a=a.score,
                score_b=b.score,
                attributes_a=a.attributes,
                attributes_b=b.attributes,
                disagreement_a=a.disagreement,
                disagreement_b=b.disagreement,
                num_tokens_a=a.num_tokens,
                num_tokens_b=b.num_tokens,
                truncated=a.truncated or b.truncated,
            )
            for a, b in zip(answer.scores[::2], answer.scores[1::2], strict=True)
        )
        return scored(PreferenceAnswer(model=_model(answer.model), items=preferences), answer)

    return router


def _input(item: Turn | Conversation | Text | Tokens, on_too_long: OnTooLong) -> ScoreInput:
    if isinstance(item, Turn):
        return _with(turn(item.prompt, item.response), on_too_long)
    if isinstance(item, Conversation):
        return _with(conversation(item.messages), on_too_long)
    if isinstance(item, Text):
        return ScoreInput(text=item.text, templated=item.templated, on_too_long=on_too_long)
    return ScoreInput(token_ids=tuple(item.token_ids), on_too_long=on_too_long)


def _with(given: ScoreInput, on_too_long: OnTooLong) -> ScoreInput:
    return ScoreInput(text=given.text, messages=given.messages, on_too_long=on_too_long)


def _model(model: ModelInfo) -> AnsweringModel:
    return AnsweringModel(
        name=model.name, version=model.version, temperature=model.temperature, attributes=model.attributes
    )
