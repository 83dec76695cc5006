"""OpenAI's chat completions as reward models answer them: the reward is the message."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.exchange import ModelInfo, Service
from rlhf_ray.reward.serve.wire.bodies import Lenient, Several, plain, read_body, scored
from rlhf_ray.reward.serve.wire.rollouts import Message, conversation, sticky_key


class ChatRequest(Lenient):
    """A conversation that ends with the response; sampling options are not read."""

    messages: Several[Message]
    model: str | None = None
    stream: bool | None = None
    n: int | None = None


class ChatMessage(TypedDict):
    """`reward:-25.625`, or `name:score` of every attribute between commas."""

    role: Literal["assistant"]
    content: str


class ChatLogprob(TypedDict):
    """An attribute in place of a token, and its score in place of a log-prob."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[str]


class ChatLogprobs(TypedDict):
    """The same scores as in the message, as numbers."""

    content: list[ChatLogprob]


class ChatChoice(TypedDict):
    """The only one."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop"]
    logprobs: ChatLogprobs


class ChatUsage(TypedDict):
    """Tokens that were scored; none is made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(TypedDict):
    """A completion whose message is the reward."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ListedModel(TypedDict):
    """A model of the service: OpenAI's fields, then ours (`ModelInfo`)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str
    role: Literal["live", "shadow"]
    share: float
    temperature: float
    attributes: list[str]
    num_members: int
    max_length: int


class ModelsAnswer(TypedDict):
    """All models, the one with the largest share first."""

    object: Literal["list"]
    data: list[ListedModel]


def routes(service: Service) -> APIRouter:
    """`/v1/chat/completions` and `/v1/models`."""
    router = APIRouter(tags=["OpenAI"])
    started = int(time.time())

    @router.post("/v1/chat/completions", summary="OpenAI chat, as reward NIMs", response_model=ChatAnswer)
    async def completions(request: Request) -> Response:
        """`reward:-25.625`, or every attribute; `logprobs.content` has the same as numbers, asked for or not."""
        body = await read_body(request, ChatRequest)
        if body.n not in (None, 1):
            raise ApiError(ErrorType.BAD_REQUEST, "n: a conversation has one score")
        if body.stream:
            raise ApiError(ErrorType.BAD_REQUEST, "stream: a score comes whole")
        given = conversation(body.messages)
        sticky = sticky_key((given.messages or ())[:-1])
        answer = await service.score([given], model=body.model, sticky=sticky)
        score = answer.scores[0]
        several = len(answer.model.attributes) > 1
        values = score.attributes if several else {"reward": score.score}
        tokens = score.num_tokens
        choice = ChatChoice(
            index=0,
            message={"role": "assistant", "content": ",".join(f"{name}:{value!r}" for name, value in values.items())},
            finish_reason="stop",
            logprobs={
                "content": [
                    {"token": name, "logprob": value, "bytes": None, "top_logprobs": []}
                    for name, value in values.items()
                ]
            },
        )
        content = ChatAnswer(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            object="chat.completion",
            created=int(time.time()),
            model=answer.model.name,
            choices=[choice],
            usage={"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        )
        return scored(content, answer)

    @router.get("/v1/models", summary="OpenAI", response_model=ModelsAnswer)
    async def models() -> Response:
        """The models of the service."""
        return plain(ModelsAnswer(object="list", data=[_listed(model, started) for model in service.models()]))

    return router


def _listed(model: ModelInfo, started: int) -> ListedModel:
    return {
        "id": model.name,
        "object": "model",
        "created": started,
        "owned_by": "rlhf_ray",
        "version": model.version,
        "role": model.role,
        "share": model.share,
        "temperature": model.temperature,
        "attributes": list(model.attributes),
        "num_members": model.num_members,
        "max_length": model.max_length,
    }
