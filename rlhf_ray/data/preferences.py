"""Human comparisons: two responses to one prompt, and which of them people prefer.

`docs/data.md` lists the row formats. Whatever the format, what a reward model scores is `prompt + response`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.data.chat import Message, parse_messages, render_turn
from rlhf_ray.data.rows import BadRows, Row, RowError, first_present, number_value, quoted_names, read_rows, text_value
from rlhf_ray.failures import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_NAMES = ("prompt", "input")


@dataclass(frozen=True)
class Votes:
    """How many people preferred which response of a pair."""

    chosen: float
    rejected: float
    tie: float


@dataclass(frozen=True)
class PreferencePair:
    """One comparison, as text.

    Attributes:
        prompt: empty where the rows hold whole texts.
        chosen, rejected: responses; `prompt + response` is the text to score.
        chosen_probability: soft label in [0, 1]: how likely a person is to prefer `chosen`.
        margin: by how much more the scores should differ, not negative, or None.
        weight: of the pair in the loss, not negative.
        source: where the pair comes from, for results by source, or None.
        attributes: how much better `chosen` is than `rejected` by name of the attribute; the sign is the label,
            0 a tie. Not every pair has every attribute.
        gap: difference of mean ratings, or None.
        votes: where the rows have them, or None.
        chosen_is_first: whether the chosen response was shown first (`response_a`; also where the votes are level),
            None where the rows do not say.
        templated: the text comes from a chat template, which has written the special tokens already.
        place: of the row.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_probability: float
    margin: float | None
    weight: float
    source: str | None
    attributes: dict[str, float]
    gap: float | None
    votes: Votes | None
    chosen_is_first: bool | None
    templated: bool
    place: str

    @property
    def raters(self) -> float | None:
        """Number of votes, or None."""
        return None if self.votes is None else self.votes.chosen + self.votes.rejected + self.votes.tie


@dataclass(frozen=True)
class PreferenceSet:
    """Comparisons in the order of their rows.

    Attributes:
        pairs: at least one.
        num_rows: rows read: pairs and bad rows.
        num_skipped: bad rows left out.
        num_ties: pairs labelled one half.
        num_identical: rows whose responses are the same text; kept only where they are labelled as ties.
        bad_rows: the rows left out.
    """

    pairs: tuple[PreferencePair, ...]
    num_rows: int
    num_skipped: int
    num_ties: int
    num_identical: int
    bad_rows: BadRows


def load_preferences(settings: PreferenceSettings, tokenizer: PreTrainedTokenizerBase, key: str) -> PreferenceSet:
    """Read and check comparisons; chat messages become text with the tokenizer's chat template.

    Args:
        tokenizer: of the model that is to score the texts.
        key: the settings key with the path, such as `pairs.path`.

    Raises:
        BadInput: unreadable source, no usable pair, or (with `on_bad_row: fail`) a bad row.
    """
    bad_rows = BadRows(settings.on_bad_row, f"{key.rpartition('.')[0]}.on_bad_row")
    pairs: list[PreferencePair] = []
    num_identical = 0
    for row in read_rows(settings.path, bad_rows, split=settings.split, limit=settings.limit, key=key):
        try:
            pair = _pair(row, tokenizer)
            if pair.chosen == pair.rejected:
                num_identical += 1
                if pair.chosen_probability != 0.5:
                    raise RowError(
                        "the two responses are the same text",
                        "different responses, or a tie (`chosen_probability` 0.5)",
                    )
        except RowError as problem:
            bad_rows.add(row.place, problem)
            continue
        pairs.append(pair)
    bad_rows.close()
    if not pairs:
        raise BadInput(
            key,
            f"'{settings.path}' has no usable pair ({bad_rows.count} bad rows, the first {bad_rows.messages[0]})",
            "at least one pair",
        )
    num_ties = sum(pair.chosen_probability == 0.5 for pair in pairs)
    num_rows = len(pairs) + bad_rows.count
    return PreferenceSet(tuple(pairs), num_rows, bad_rows.count, num_ties, num_identical, bad_rows)


def attribute_names(pairs: Iterable[PreferencePair]) -> tuple[str, ...]:
    """Names of all attributes that occur, in alphabetical order."""
    return tuple(sorted({name for pair in pairs for name in pair.attributes}))


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase) -> PreferencePair:
    values = row.values
    names, probability, votes = ("chosen", "rejected"), 1.0, None
    if "chosen" not in values and ("response_a" in values or "votes" in values):
        names, probability, votes = _from_votes(values)
    if "chosen_probability" in values:
        probability = number_value(values["chosen_probability"], "chosen_probability", low=0, high=1)
    prompt, chosen, rejected, templated = _texts(values, names, tokenizer)
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_probability=probability,
        margin=_optional_number(values, "margin", low=0),
        weight=number_value(values.get("weight", 1.0), "weight", low=0),
        source=_source(values),
        attributes=_attributes(values, names),
        gap=_optional_number(values, "gap"),
        votes=votes,
        chosen_is_first=None if votes is None else names[0] == "response_a",
        templated=templated,
        place=row.place,
    )


def _from_votes(values: Mapping[str, Any]) -> tuple[tuple[str, str], float, Votes]:
    """Names of the chosen and rejected columns, the share of votes for the chosen one (ties half), and the votes.

    With as many votes for b as for a, a stays the chosen one, with one half.
    """
    _, counts = first_present(values, ("votes",))
    if not isinstance(counts, dict) or not {"a", "b"} <= counts.keys():
        raise RowError("`votes` is malformed", "`votes` with counts `a`, `b` and (optionally) `tie`")
    a, b, tie = (number_value(counts.get(name) or 0, f"votes.{name}", low=0) for name in ("a", "b", "tie"))
    total = a + b + tie
    if total == 0:
        raise RowError("`votes` has no votes", "at least one vote")
    names = ("response_b", "response_a") if b > a else ("response_a", "response_b")
    return names, (max(a, b) + tie / 2) / total, Votes(max(a, b), min(a, b), tie)


def _texts(
    values: Mapping[str, Any], names: tuple[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str, str, bool]:
    """Prompt, chosen and rejected as text, and whether a chat template wrote it.

    Without `prompt`, strings are whole texts, and messages are whole conversations.
    """
    chosen, rejected = (first_present(values, (name,))[1] for name in names)
    prompt = next((values[name] for name in PROMPT_NAMES if name in values), None)
    if not any(isinstance(value, list) for value in (prompt, chosen, rejected)):
        prompt_text = "" if prompt is None else text_value(prompt, "prompt")
        return prompt_text, text_value(chosen, names[0]), text_value(rejected, names[1]), False
    context, answers = _split_conversations(
        _as_messages(prompt, "prompt", "user") if prompt is not None else None,
        _as_messages(chosen, names[0], "assistant"),
        _as_messages(rejected, names[1], "assistant"),
        names,
    )
    for name, answer in zip(names, answers, strict=True):
        if not any(message["content"].strip() for message in answer):
            raise RowError(f"`{name}` is empty", "an answer that is not blank")
    (prompt_text, chosen_text), (_, rejected_text) = (render_turn(tokenizer, context, answer) for answer in answers)
    return prompt_text, chosen_text, rejected_text, True


def _as_messages(value: Any, name: str, role: str) -> list[Message]:
    """Chat messages; a string beside messages stands for one message."""
    return (
        parse_messages(value, name) if isinstance(value, list) else [{"role": role, "content": text_value(value, name)}]
    )


def _split_conversations(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message], names: tuple[str, str]
) -> tuple[list[Message], tuple[list[Message], list[Message]]]:
    """Common prompt and the two answers, from answers alone or from whole conversations (TRL's implicit prompt)."""
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return prompt, (chosen, rejected)
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    context = chosen[:length]
    if not context:
        raise RowError(
            f"`{names[0]}` and `{names[1]}` do not begin with the same message",
            "answers to a `prompt`, or whole conversations with a common beginning",
        )
    starts = range(len(context))
    if prompt is not None and all(context[start : start + len(prompt)] != prompt for start in starts):
        raise RowError(
            f"the conversations in `{names[0]}` and `{names[1]}` do not begin with `prompt`",
            "answers to the prompt, or conversations that begin with it",
        )
    return context, (chosen[length:], rejected[length:])


def _optional_number(values: Mapping[str, Any], name: str, low: float = -math.inf) -> float | None:
    return number_value(values[name], name, low=low) if name in values else None


def _source(values: Mapping[str, Any]) -> str | None:
    source = values.get("source")
    if source is not None and not isinstance(source, str):
        raise RowError("`source` is not a string", "a name")
    return source


def _attributes(values: Mapping[str, Any], names: tuple[str, str]) -> dict[str, float]:
    """Attributes as differences, turned with the pair: `names` are the columns of the chosen and rejected response."""
    attributes = values.get("attributes", {})
    if not isinstance(attributes, dict):
        raise RowError("`attributes` is not an object", "differences, or pairs of ratings, by name")
    sides = [name.removeprefix("response_") for name in names]
    differences = {}
    for name, value in attributes.items():
        where = f"attributes.{name}"
        if isinstance(value, dict):
            if not value.keys() <= set(sides):
                allowed = f"{quoted_names(sorted(sides))} with ratings, or their difference"
                raise RowError(f"`{where}` has {quoted_names(value)}", allowed)
            ratings = [value.get(side) for side in sides]
            # Columns of Parquet and `datasets` have every attribute in every row, with nulls where there is none.
            if all(rating is None for rating in ratings):
                continue
            chosen, rejected = (
                number_value(rating, f"{where}.{side}") for rating, side in zip(ratings, sides, strict=True)
            )
        elif value is not None:
            difference = number_value(value, where)
            chosen, rejected = (difference, 0.0) if sides[0] != "b" else (0.0, difference)
        else:
            continue
        differences[str(name)] = number_value(chosen - rejected, where)
    return differences
