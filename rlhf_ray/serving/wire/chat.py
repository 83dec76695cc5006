"""OpenAI's chat completions as reward models answer them: the reward is the message."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from rlhf_ray.serving.errors import ApiError, ErrorType
from rlhf_ray.serving.exchange import ModelInfo, Service
from rlhf_ray.serving.wire.bodies import Lenient, plain, read_body, scored
from rlhf_ray.serving.wire.rollouts import Message, conversation, sticky_key


class ChatRequest(Lenient):
    """A conversation that ends with the response; sampling options are not read."""

    messages: list[Message]
    model: str | None = None
    stream: bool | None = None
    n: int | None = None


def routes(service: Service) -> APIRouter:
    """`/v1/chat/completions` and `/v1/models`."""
    router = APIRouter(tags=["OpenAI"])
    started = int(time.time())

    @router.post("/v1/chat/completions", summary="OpenAI chat, as reward NIMs")
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
        message = {"role": "assistant", "content": ",".join(f"{name}:{value!r}" for name, value in values.items())}
        logprobs: list[dict[str, Any]] = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in values.items()
        ]
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": logprobs}}
        content = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": answer.model.name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": score.num_tokens,
                "completion_tokens": 0,
                "total_tokens": score.num_tokens,
            },
        }
        return scored(content, answer)

    @router.get("/v1/models", summary="OpenAI")
    async def models() -> Response:
        """The models of the service."""
        return plain({"object": "list", "data": [_listed(model, started) for model in service.models()]})

    return router


def _listed(model: ModelInfo, started: int) -> dict[str, Any]:
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
