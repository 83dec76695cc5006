"""Reading held-out responses: as text for people, and by a judge that nothing was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.rollout import RewardColumn, Rollout, TokenColumn

Judge = Literal["none", "vader"]


@dataclass(frozen=True)
class EvaluatedSample:
    """One held-out response.

    Attributes:
        sample_id, prompt_id: of the rollout; the same before and after training.
        num_tokens: of the response.
        kl: summed per-token k1 against the reference in nats, or None without one.
        reward: score of the reward model, or None with the cause in `failure`.
        judgement: of the independent judge, or None.
    """

    sample_id: int
    prompt_id: int
    prompt: str
    response: str
    num_tokens: int
    kl: float | None
    reward: float | None
    failure: str
    judgement: float | None


class Evaluator:
    """Decodes and judges.

    Args:
        policy_model: whose tokenizer decodes.
        judge: `vader` is `vader_judge` of the response alone.
    """

    def __init__(self, policy_model: str, judge: Judge) -> None:
        self._tokenizer = load_tokenizer(policy_model, "policy.model")
        self._judge = vader_judge() if judge == "vader" else None

    def read(
        self,
        rollout: Rollout,
        rewards: RewardColumn,
        prompts: Mapping[int, Conversation],
        reference: TokenColumn | None = None,
    ) -> list[EvaluatedSample]:
        """One entry a sample, in the order of the rollout."""
        samples = []
        starts = rollout.response_starts()
        distance = None if reference is None else rollout.logprobs.astype(float) - reference.data
        for index in range(rollout.num_samples):
            response_ids = rollout.sample_tokens(index)[int(rollout.prompt_lengths[index]) :]
            response = self._tokenizer.decode(response_ids, skip_special_tokens=True)
            failure = rewards.failures[index]
            samples.append(
                EvaluatedSample(
                    sample_id=int(rollout.sample_ids[index]),
                    prompt_id=int(rollout.prompt_ids[index]),
                    prompt=prompts[int(rollout.prompt_ids[index])].text,
                    response=response,
                    num_tokens=len(response_ids),
                    kl=None if distance is None else float(distance[starts[index] : starts[index + 1]].sum()),
                    reward=None if failure else float(rewards.scores[index]),
                    failure=failure,
                    judgement=None if self._judge is None else self._judge(response),
                )
            )
        return samples


def vader_judge() -> Callable[[str], float]:
    """The compound score in [−1, 1] of the VADER lexicon (Hutto & Gilbert 2014); 0 for an empty text."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])
