"""What a client of the reward service asks and in which order, and what it is answered. Nothing here sends.

A method of the client is a generator: it yields one request after another, is sent the body of each answer or has its
failure thrown in, and returns the result. `rlhf_ray.reward.client.clients` drives it over HTTP, waiting or not.
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from rlhf_ray.reward.client.errors import (
    InvalidAnswer,
    NotFound,
    RewardServiceError,
    TooLarge,
    Unscorable,
    VersionChanged,
)
from rlhf_ray.reward.client.schema import (
    Answer,
    AnsweringModel,
    Item,
    ModelList,
    Preference,
    PreferenceAnswer,
    Received,
    Reward,
    RewardAnswer,
    ServedModel,
)

OnTooLong = Literal["default", "fail", "truncate"]
Message = dict[str, Any]


@dataclass(frozen=True)
class PromptResponse:
    """A prompt (text, or chat messages that the model's own template renders) and a response to it."""

    prompt: str | Sequence[Message]
    response: str


@dataclass(frozen=True)
class Messages:
    """A conversation that ends with the response."""

    messages: Sequence[Message]


@dataclass(frozen=True)
class Text:
    """Prompt and response as one text.

    Attributes:
        templated: a chat template has written the special tokens already.
    """

    text: str
    templated: bool = False


@dataclass(frozen=True)
class TokenIds:
    """A text as the model is to be given it, special tokens included."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class ResponsePair:
    """Two responses to one prompt."""

    prompt: str | Sequence[Message]
    response_a: str
    response_b: str


RewardItem = PromptResponse | Messages | Text | TokenIds


Result = TypeVar("Result")


@dataclass(frozen=True)
class Rewards:
    """Rewards in the order of the items, all of one version of one model."""

    model: AnsweringModel
    items: tuple[Reward, ...]


@dataclass(frozen=True)
class Preferences:
    """Preferences in the order of the pairs, all of one version of one model."""

    model: AnsweringModel
    items: tuple[Preference, ...]


@dataclass(frozen=True)
class EachReward:
    """For each item its reward, or why it has none.

    Attributes:
        model: None where not one item was scored.
    """

    model: AnsweringModel | None
    outcomes: tuple[Reward | RewardServiceError, ...]


@dataclass(frozen=True)
class Call:
    """One request of the API."""

    method: Literal["GET", "POST"]
    path: str
    content: bytes
    request_id: str


def _get(path: str) -> Call:
    return Call("GET", path, b"", uuid.uuid4().hex)


def _post(path: str, body: dict[str, Any]) -> Call:
    # ASCII: half a surrogate pair has no UTF-8 and is for the service to judge.
    return Call("POST", path, json.dumps(body).encode("ascii"), uuid.uuid4().hex)


Flow = Generator[Call, bytes, Result]


def ask_models() -> Flow[tuple[ServedModel, ...]]:
    """The models of the service."""
    call = _get("/v1/models")
    return _parsed(ModelList, (yield call), call.request_id).data


def ask_health() -> Flow[None]:
    """Nothing, once the service is healthy."""
    yield _get("/health")


def ask_rewards(
    items: Sequence[RewardItem], model: str | None, on_too_long: OnTooLong, max_items: int
) -> Flow[Rewards]:
    """A reward for every item, or the failure of the first that has none."""
    flow = _scored(RewardAnswer, "/v1/reward", items, model, {"on_too_long": on_too_long}, max_items, keep=False)
    served, outcomes = yield from flow
    assert served is not None, "what cannot be scored was to be raised"
    return Rewards(served, tuple(reward for reward in outcomes if isinstance(reward, Reward)))


def ask_each_reward(
    items: Sequence[RewardItem], model: str | None, on_too_long: OnTooLong, max_items: int
) -> Flow[EachReward]:
    """For every item a reward or its failure."""
    flow = _scored(RewardAnswer, "/v1/reward", items, model, {"on_too_long": on_too_long}, max_items, keep=True)
    return EachReward(*(yield from flow))


def ask_preferences(pairs: Sequence[ResponsePair], model: str | None, max_items: int) -> Flow[Preferences]:
    """The preference of every pair."""
    # A pair is two texts.
    flow = _scored(PreferenceAnswer, "/v1/preference", pairs, model, {}, max(1, max_items // 2), keep=False)
    served, outcomes = yield from flow
    assert served is not None, "what cannot be scored was to be raised"
    return Preferences(served, tuple(pair for pair in outcomes if isinstance(pair, Preference)))


def _scored(
    answer_type: type[Answer[Item]],
    path: str,
    items: Sequence[RewardItem] | Sequence[ResponsePair],
    model: str | None,
    options: dict[str, Any],
    max_items: int,
    *,
    keep: bool,
) -> Flow[tuple[AnsweringModel | None, tuple[Item | RewardServiceError, ...]]]:
    """All items by one version of one model, in requests of at most `max_items`.

    Args:
        keep: put what cannot be scored in its item's place; else it is raised.
    """
    for _ in range(2):
        found = yield from _scored_by_one(answer_type, path, items, model, options, max_items, keep)
        if found is not None:
            return found
    raise VersionChanged("the service changed the model twice while the batch was scored")


def _scored_by_one(
    answer_type: type[Answer[Item]],
    path: str,
    items: Sequence[RewardItem] | Sequence[ResponsePair],
    model: str | None,
    options: dict[str, Any],
    max_items: int,
    keep: bool,
) -> Flow[tuple[AnsweringModel | None, tuple[Item | RewardServiceError, ...]] | None]:
    """As `_scored`; None where a version took the place of the first request's."""
    served: AnsweringModel | None = None
    outcomes: dict[int, Item | RewardServiceError] = {}
    waiting = deque(
        list(range(start, min(start + max_items, len(items)))) for start in range(0, max(len(items), 1), max_items)
    )
    while waiting:
        rows = waiting.popleft()
        # Later requests ask for the version that the first one got: with a canary it may be any.
        name = served.version if served else model
        body = {"items": [asdict(items[row]) for row in rows], **options, **({"model": name} if name else {})}
        call = _post(path, body)
        try:
            answer = _parsed(answer_type, (yield call), call.request_id)
        except NotFound:
            if served is None:
                raise
            return None
        except TooLarge as error:
            if len(rows) > 1:
                waiting.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
                continue
            error.index = rows[0] if rows else None
            if not (keep and rows):
                raise
            outcomes[rows[0]] = error
            continue
        except Unscorable as error:
            if error.index is None or not 0 <= error.index < len(rows):
                raise InvalidAnswer("a text cannot be scored, and no index says which", call.request_id) from error
            error.index = rows.pop(error.index)
            if not keep:
                raise
            outcomes[error.index] = error
            if rows:
                waiting.appendleft(rows)
            continue
        if len(answer.items) != len(rows):
            raise InvalidAnswer(f"{len(answer.items)} scores for {len(rows)} items", call.request_id)
        if served is not None and answer.model.version != served.version:
            return None
        served = answer.model
        outcomes.update(zip(rows, answer.items, strict=True))
    return served, tuple(outcomes[row] for row in range(len(items)))


Part = TypeVar("Part", bound=Received)


def _parsed(part: type[Part], content: bytes, request_id: str) -> Part:
    try:
        return part.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(key) for key in first["loc"]) or "the body"
        raise InvalidAnswer(f"{place}: {first['msg']}", request_id) from None
