"""Bodies in, answers out: parsed once, checked against a model, and never with a text in an error message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic_core
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.card import sigmoid as sigmoid
from rlhf_ray.reward.serve.exchange import Answer

Body = TypeVar("Body", bound=BaseModel)
Entry = TypeVar("Entry")
# The first wrong entry refuses a list: one message for each of a hundred thousand holds up everybody for seconds.
Several = Annotated[list[Entry], Field(fail_fast=True)]


class Lenient(BaseModel):
    """A body of a protocol whose servers ignore fields that they do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Strict(BaseModel):
    """A body of our own protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)


async def read_json(request: Request) -> Any:
    """The body, whatever its content type says; clients send JSON under many.

    Raises:
        ApiError: it is no JSON.
    """
    try:
        return pydantic_core.from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        # The message of the parser has a position, and nothing of the text.
        raise ApiError(ErrorType.BAD_REQUEST, f"the body is not JSON ({error})") from None


def checked(model: type[Body], value: Any) -> Body:
    """A parsed body as a model.

    Raises:
        ApiError: naming the first field that is wrong.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        # A field that nobody knows is named by the client, who may have put a text there.
        known = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
        place = ".".join(str(part) for part in known) or "the body"
        index = first["loc"][1] if len(first["loc"]) > 1 and isinstance(first["loc"][1], int) else None
        raise ApiError(ErrorType.BAD_REQUEST, f"{place}: {first['msg']}", index=index) from None


async def read_body(request: Request, model: type[Body]) -> Body:
    """A request's body as a model."""
    return checked(model, await read_json(request))


def scored(content: Any, answer: Answer, scale: str = "raw", tei: bool = False) -> Response:
    """An answer with its model, its scale and its times.

    Raises:
        ApiError: a score is no number; a failure is never null, which clients would train on.
    """
    for index, score in enumerate(answer.scores):
        if not all(map(math.isfinite, (score.score, score.disagreement, *score.attributes.values()))):
            raise ApiError(ErrorType.UNSCORABLE, f"text {index}: no finite score", index=index)
    times = answer.timings
    headers = {
        "X-Model-Name": answer.model.name,
        "X-Model-Version": answer.model.version,
        "X-Score-Scale": scale,
        "X-Tokenize-Time": f"{times.tokenize_s * 1000:.3f}",
        "X-Queue-Time": f"{times.queue_s * 1000:.3f}",
        "X-Compute-Time": f"{times.compute_s * 1000:.3f}",
    }
    if tei:
        headers |= {
            "X-Compute-Type": "cpu" if answer.model.dtype == "float32" else answer.model.dtype,
            "X-Compute-Tokens": str(sum(score.num_tokens for score in answer.scores)),
            "X-Tokenization-Time": f"{times.tokenize_s * 1000:.0f}",
            "X-Inference-Time": f"{times.compute_s * 1000:.0f}",
        }
    return plain(content, headers=headers)


def plain(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Any JSON answer."""
    return Response(
        pydantic_core.to_json(content, inf_nan_mode="null"), status, headers=headers, media_type="application/json"
    )
