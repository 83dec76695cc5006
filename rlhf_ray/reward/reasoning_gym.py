"""Scores of reasoning-gym's tasks, for `reward.function`: `rlhf_ray.reward.reasoning_gym:score`.

Needs the extra `rlhf-ray[verifiable]`. Labels are the task's own entries, with `answer` and `metadata`, as
`rlhf-ray prepare chain-sum` writes them.
"""

from __future__ import annotations

from typing import Any

from reasoning_gym import get_score_answer_fn
from reasoning_gym.utils import extract_answer


def score(responses: list[str], labels: list[dict[str, Any]]) -> list[float]:
    """What the task gives for each response, or for its part in `<answer>` tags."""
    scores = []
    for response, entry in zip(responses, labels, strict=True):
        answer = extract_answer(response) or response.strip()
        scores.append(float(get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry)))
    return scores
