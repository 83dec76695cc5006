"""Ready-made reward functions, for `reward.function`: `rlhf_ray.reward.functions:last_number`.

Each takes lists with one entry a sample and gives a score in 0…1 for each, or None (no score) where the prompt's row
has no label to compare with. `docs/rewards.md` says how to write one's own.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(responses: list[str], labels: list[Any]) -> list[float | None]:
    """1 where the response is the label, white space around both aside."""
    return [
        None if label is None else float(response.strip() == str(label).strip())
        for response, label in zip(responses, labels, strict=True)
    ]


def contains_label(responses: list[str], labels: list[Any]) -> list[float | None]:
    """1 where the label is in the response, as words of its own and in either case."""
    return [
        None
        if label is None
        else float(re.search(rf"(?<!\w){re.escape(str(label).strip())}(?!\w)", response, re.I) is not None)
        for response, label in zip(responses, labels, strict=True)
    ]


def last_number(responses: list[str], labels: list[Any]) -> list[float | None]:
    """1 where the last number in the response equals the last number in the label, so that GSM8K's worked answers are
    labels as they are. A response without a number scores 0."""
    scores: list[float | None] = []
    for response, label in zip(responses, labels, strict=True):
        wanted = _last_number(str(label))
        scores.append(None if wanted is None else float(_last_number(response) == wanted))
    return scores


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
