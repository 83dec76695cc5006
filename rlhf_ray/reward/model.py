"""A reward model in this process.

    model = RewardModel.load("runs/my-model/reward_model")
    model.score("The movie was", " a joy from start to end.")
    model.compare("The movie was", " a joy.", " a bore.")

Texts become tokens, and tokens scores, in the scorer that `eval-rm`, PPO and the service use: the numbers are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias, overload

from rlhf_ray.config.reward import RewardSettings, ScorerSettings
from rlhf_ray.data.chat import Message
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput, Refused
from rlhf_ray.models.loading import read_model_facts
from rlhf_ray.reward.core.card import RewardModelCard, sigmoid
from rlhf_ray.reward.core.loading import check_reward_model
from rlhf_ray.reward.core.scorer import RewardScorer

Prompt: TypeAlias = str | Sequence[Message]
"""A text, or chat messages that the model's own template renders."""


class RewardModel:
    """Scores responses. Lists in place of a prompt and a response score many at once, as fast as the batches allow; a
    score alone and in a list is the same up to rounding, and bit-for-bit with `batch_invariant=True`.

    Args:
        scorer: has the model in memory.

    Attributes:
        version: of the weights and everything else that a score depends on.
        temperature: σ(Δ/T) of a difference of scores is the calibrated probability that people prefer the one to the
            other.
    """

    def __init__(self, scorer: RewardScorer) -> None:
        self._scorer = scorer
        self.version = scorer.version
        self.temperature = scorer.texts.card.temperature if scorer.texts.card else 1.0

    @classmethod
    def load(cls, directory: str | Path, *, require_release: bool = True, **settings: Any) -> Self:
        """Read a reward model: one that `train-rm` wrote, or any `AutoModelForSequenceClassification` with one label.

        Args:
            require_release: refuse a model that the release gate refused.
            settings: keys of the section `scorer`, such as `on_too_long="truncate"` or `gpus=1`.

        Raises:
            BadInput: there is none.
            Refused: by the release gate, with its reasons.
        """
        model = str(directory)
        card = RewardModelCard.load(model, "directory")
        check_reward_model(read_model_facts(model, "directory"), card, model, "directory")
        if card is not None and card.released is False and require_release:
            raise Refused(model, card.refusals)
        return cls(RewardScorer(RewardSettings(**ScorerSettings(**settings).model_dump(), model=model)))

    @overload
    def score(self, prompt: Prompt, response: str) -> float: ...
    @overload
    def score(self, prompt: Sequence[Prompt], response: list[str]) -> list[float]: ...
    def score(self, prompt: Prompt | Sequence[Prompt], response: str | list[str]) -> float | list[float]:
        """How good a response is, on the model's raw scale; of lists, one score for each prompt and its response.

        Raises:
            BadInput: a text has no score: it is too long, or the chat template does not take it.
        """
        if isinstance(response, str):
            return self._scores([prompt], [response])[0]
        return self._scores(prompt, response)

    @overload
    def compare(self, prompt: Prompt, a: str, b: str) -> float: ...
    @overload
    def compare(self, prompt: Sequence[Prompt], a: list[str], b: list[str]) -> list[float]: ...
    def compare(self, prompt: Prompt | Sequence[Prompt], a: str | list[str], b: str | list[str]) -> float | list[float]:
        """The calibrated probability that people prefer response a to response b; of lists, one for each prompt.

        Raises:
            BadInput: as `score`.
        """
        if isinstance(a, str):
            return self.compare([prompt], [a], [b])[0]  # type: ignore[list-item]
        _refuse_one(prompt)
        scores = self._scores([*prompt, *prompt], [*a, *b])
        pairs = zip(scores[: len(a)], scores[len(a) :], strict=True)
        return [sigmoid((score_a - score_b) / self.temperature) for score_a, score_b in pairs]

    def _scores(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        _refuse_one(prompts)
        encoded = []
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                encoded.append(self._scorer.texts.encode_turn(prompt, response))
            except RowError as problem:
                raise BadInput(f"response {place}", problem.found, problem.allowed) from None
        scored = self._scorer.score_encoded(encoded)
        for place, cause in enumerate(scored.failures):
            if cause:
                raise BadInput(f"response {place}", cause, "a text that the model can score")
        return [float(score) for score in scored.scores]


def _refuse_one(prompts: Sequence[Any]) -> None:
    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise TypeError("one prompt and several responses; a list of responses takes a list of as many prompts")
