"""Reward clients of trainers with a protocol of their own: OpenRLHF and slime."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.exchange import Answer, ScoreInput, Service
from rlhf_ray.reward.serve.wire.bodies import Lenient, Several, plain, read_body, scored

Message = dict[str, Any]


class OpenRLHFRequest(Lenient):
    """What OpenRLHF's remote reward client posts.

    Attributes:
        query: whole texts, prompt and response, templated.
        prompts: of each; requests with the same first prompt go to the same model.
        labels: not read.
    """

    query: Several[str]
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class SlimeRequest(Lenient):
    """What slime's remote reward client posts for one sample.

    Attributes:
        prompt: a text, or chat messages.
        label: not read.
    """

    prompt: str | Several[Message]
    response: str
    label: Any = None


class OpenRLHFAnswer(TypedDict):
    """Rewards of the texts, in their order; `scores` is the same, and `extra_logs` what OpenRLHF logs beside them."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class SlimeAnswer(TypedDict):
    """The reward of one sample, under both names that runs read."""

    score: float
    reward: float
    disagreement: float
    truncated: int


def routes(service: Service) -> APIRouter:
    """`/get_reward` and `/slime`."""
    router = APIRouter(tags=["trainers"])

    @router.post("/get_reward", summary="OpenRLHF", response_model=OpenRLHFAnswer)
    async def get_reward(request: Request) -> Response:
        """Rewards of whole texts. Empty lists, which OpenRLHF sends to servers it does not need, get empty lists."""
        body = await read_body(request, OpenRLHFRequest)
        if not body.query:
            return plain(OpenRLHFAnswer(rewards=[], scores=[], extra_logs={}))
        sticky = sticky_key(body.prompts[0]) if body.prompts and body.prompts[0] else None
        answer = await service.score([ScoreInput(text=text) for text in body.query], sticky=sticky)
        rewards = [score.score for score in answer.scores]
        return scored(OpenRLHFAnswer(rewards=rewards, scores=rewards, extra_logs=extra_logs(answer)), answer)

    @router.post("/slime", summary="slime", response_model=SlimeAnswer | float)
    async def slime(request: Request) -> Response:
        """The reward of one sample; `--reward-key score` (or `reward`) reads it. A run without that key takes the whole
        answer for the reward: its URL ends in `?format=number`."""
        body = await read_body(request, SlimeRequest)
        answer = await service.score([turn(body.prompt, body.response)], sticky=sticky_key(body.prompt))
        score = answer.scores[0]
        if request.query_params.get("format") == "number":
            return scored(score.score, answer)
        content = SlimeAnswer(
            score=score.score, reward=score.score, disagreement=score.disagreement, truncated=int(score.truncated)
        )
        return scored(content, answer)

    return router


def extra_logs(answer: Answer) -> dict[str, list[float]]:
    """What OpenRLHF logs beside the rewards: numbers only, one a text."""
    logs: dict[str, list[float]] = {
        "num_tokens": [float(score.num_tokens) for score in answer.scores],
        "truncated": [float(score.truncated) for score in answer.scores],
    }
    if answer.model.num_members > 1:
        logs["disagreement"] = [score.disagreement for score in answer.scores]
    if len(answer.model.attributes) > 1:
        for name in answer.model.attributes:
            logs[name] = [score.attributes[name] for score in answer.scores]
    return logs


def turn(prompt: str | list[Message], response: str) -> ScoreInput:
    """A prompt and its response as one input."""
    if isinstance(prompt, str):
        return ScoreInput(text=prompt + response)
    return conversation([*prompt, {"role": "assistant", "content": response}])


def conversation(messages: list[Message]) -> ScoreInput:
    """Chat messages that end with the response.

    Raises:
        ApiError: they do not, or a message is none.
    """
    plain_messages = tuple(_plain(message, place) for place, message in enumerate(messages))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ApiError(ErrorType.BAD_REQUEST, "messages: the last must be the assistant's, after the prompt's")
    return ScoreInput(messages=plain_messages)


def _plain(message: Message, place: int) -> Message:
    """Role and text of a message; its content may come in parts."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    if not isinstance(role, str) or not isinstance(content, str):
        raise ApiError(ErrorType.BAD_REQUEST, f"message {place}: role and content must be text")
    return {"role": role, "content": content}


def sticky_key(prompt: Any) -> str:
    """Requests with the same prompt go to the same model."""
    return hashlib.blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
