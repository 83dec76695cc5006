"""What passes between the wire protocols and the service behind them.

A protocol turns a request into `ScoreInput`s, hands them to a `Service` in one call, and writes the `Answer` in its
own words. All inputs of a call are scored by one version of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol


@dataclass(frozen=True)
class ScoreInput:
    """One text to score. Exactly one of `text`, `token_ids` and `messages` is given.

    Attributes:
        text: prompt and response, as one.
        token_ids: as the model is to be given them, special ones included.
        messages: a conversation, rendered with the reward model's own chat template.
        templated: `text` has its special tokens already.
        max_tokens: longest that is scored; None for the model's limit. More than that is refused.
        keep: which end of a longer text is scored.
        on_too_long: `default` is what the service is set to.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    templated: bool = False
    max_tokens: int | None = None
    keep: Literal["end", "start"] = "end"
    on_too_long: Literal["default", "fail", "truncate"] = "default"


@dataclass(frozen=True)
class Score:
    """What a model says of one text.

    Attributes:
        score: the aggregated score on the model's raw scale (logits); always finite.
        attributes: score of each attribute, the members of an ensemble averaged, on the raw scale.
        disagreement: standard deviation over the members of an ensemble, in the unit of the score; 0 for one member.
        num_tokens: as scored.
        truncated: whether the text was cut.
    """

    score: float
    attributes: dict[str, float]
    disagreement: float
    num_tokens: int
    truncated: bool


class ModelId(NamedTuple):
    """An entry of the configuration with the weights that it stood for: two entries may have equal weights, and an
    entry other weights than before."""

    name: str
    version: str


@dataclass(frozen=True)
class ModelInfo:
    """A model of the service.

    Attributes:
        name: what requests call it.
        version: of its weights and everything else that a score depends on.
        temperature: σ(Δ/T) of a difference of scores is the calibrated preference probability.
        attributes: names of what it scores; a single one is `preference`.
        num_members: of its ensemble; 1 for a single model.
        max_length: longest text in tokens.
        dtype: compute type.
        role: `live`, or `shadow` for one that answers only when it is named.
        share: of the requests that name no model.
    """

    name: str
    version: str
    temperature: float
    attributes: tuple[str, ...]
    num_members: int
    max_length: int
    dtype: str
    role: Literal["live", "shadow"]
    share: float

    @property
    def id(self) -> ModelId:
        """What its work is counted under."""
        return ModelId(self.name, self.version)


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, seconds."""

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """Scores of all inputs of one call, in their order, from one version of one model."""

    scores: tuple[Score, ...]
    model: ModelInfo
    timings: Timings = field(default_factory=Timings)


class Service(Protocol):
    """What the wire protocols ask of the service."""

    async def score(
        self, inputs: Sequence[ScoreInput], *, model: str | None = None, sticky: str | None = None
    ) -> Answer:
        """Score all inputs.

        Args:
            model: a model by name or version; None lets the service choose, and so does a name that it does not know,
                but for our own protocol.
            sticky: requests with the same key go to the same model while the shares stay as they are.

        Raises:
            ApiError: one of `rlhf_ray.reward.client.service_errors`; nothing was scored in part.
        """

    def models(self) -> tuple[ModelInfo, ...]:
        """The models, the one with the largest share first."""
