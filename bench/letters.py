"""A reward that any policy can learn in a minute, and whose answer is known: the share of words with an `e`."""

from __future__ import annotations

from collections.abc import Sequence


def words_with_e(responses: Sequence[str]) -> list[float | None]:
    """Of each response; a response without words has no score."""
    words = [response.split() for response in responses]
    return [sum("e" in word for word in each) / len(each) if each else None for each in words]
