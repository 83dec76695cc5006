"""What a client asks of the reward service, and what it is answered: written by the service, read by the client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rlhf_ray.reward.client.errors import RewardServiceError

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


class Received(BaseModel):
    """A part of an answer: exactly typed, finite, and free to have more fields than a client knows."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class AnsweringModel(Received):
    """The model behind an answer.

    Attributes:
        version: of its weights and everything else that a score depends on.
        temperature: σ(Δ/T) of a difference of scores is the calibrated preference probability.
        attributes: names of what it scores.
    """

    name: str
    version: str
    temperature: float
    attributes: tuple[str, ...]


class Reward(Received):
    """What the model says of one text.

    Attributes:
        score: on the model's raw scale (logits).
        attributes: score of each attribute, on the raw scale.
        disagreement: standard deviation over the members of an ensemble, in the unit of the score; 0 for one member.
        num_tokens: as scored.
        truncated: whether the text was cut.
    """

    score: float
    attributes: dict[str, float]
    disagreement: float
    num_tokens: int
    truncated: bool


class Preference(Received):
    """What the model says of two responses.

    Attributes:
        probability: calibrated probability that people prefer response a.
        score_a, score_b: on the model's raw scale.
        attributes_a, attributes_b, disagreement_a, disagreement_b, num_tokens_a, num_tokens_b: as in `Reward`.
        truncated: whether one of the texts was cut.
    """

    probability: Annotated[float, Field(ge=0, le=1)]
    score_a: float
    score_b: float
    attributes_a: dict[str, float]
    attributes_b: dict[str, float]
    disagreement_a: float
    disagreement_b: float
    num_tokens_a: int
    num_tokens_b: int
    truncated: bool


class ServedModel(Received):
    """A model of the service; `rlhf_ray.reward.serve.exchange.ModelInfo` as clients see it."""

    id: str
    version: str
    role: Literal["live", "shadow"]
    share: float
    temperature: float
    attributes: tuple[str, ...]
    num_members: int
    max_length: int


Item = TypeVar("Item", Reward, Preference)


class Answer(Received, Generic[Item]):
    """One entry for each item, in their order, all of one version of one model."""

    model: AnsweringModel
    items: tuple[Item, ...]


class RewardAnswer(Answer[Reward]):
    """What `/v1/reward` answers."""


class PreferenceAnswer(Answer[Preference]):
    """What `/v1/preference` answers."""


class ModelList(Received):
    """What `/v1/models` answers."""

    data: tuple[ServedModel, ...]


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
