"""Prompts, and which of them a step draws.

The order is the concatenation, over epochs, of one keyed permutation of the set each. Step s takes entries
s·count to (s+1)·count − 1 of it, so what a step draws depends on nothing that was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.settings import PromptSettings
from rlhf_ray.data.chat import Message, parse_messages, render
from rlhf_ray.data.rows import BadRows, RowError, first_present, read_rows, text_value
from rlhf_ray.failures import BadInput
from rlhf_ray.randomness import keyed_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt of the set.

    Attributes:
        index: its position in the set.
        token_ids: `[n]` int32, what the engine is given.
        text: the same before tokenisation (chat messages as the template renders them).
        label: the row's `label`, or None.
        messages: the chat messages it was made from, or None for a string.
    """

    index: int
    token_ids: NDArray[np.int32]
    text: str
    label: object | None
    messages: tuple[Message, ...] | None = None


class PromptSet:
    """Prompts in the order of their rows.

    Args:
        prompts: at least one.
        bad_rows: the rows that were left out.
    """

    def __init__(self, prompts: Sequence[Prompt], bad_rows: BadRows) -> None:
        if not prompts:
            raise ValueError("a prompt set needs at least one prompt")
        self._prompts = tuple(prompts)
        self.bad_rows = bad_rows

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    @property
    def num_skipped(self) -> int:
        return self.bad_rows.count

    @cached_property
    def digest(self) -> str:
        """Of all prompts and labels in their order, in hex."""
        hashed = hashlib.blake2b(digest_size=6)
        for prompt in self:
            hashed.update(repr((prompt.token_ids.tolist(), prompt.label)).encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()

    def draw(self, seed: int, step: int, count: int) -> list[tuple[int, Prompt]]:
        """The prompts of one step, as pairs of the run-wide draw id and the prompt.

        A pure function of its arguments. Draw n is entry n mod N of the permutation of epoch n div N.

        Args:
            seed: the run's seed.
            step: from 0.
            count: prompts a step, the same at every step of a run; may exceed the size of the set.
        """
        size = len(self)
        drawn: list[tuple[int, Prompt]] = []
        for epoch in range(step * count // size, ((step + 1) * count - 1) // size + 1):
            order = keyed_generator(seed, "prompt-order", epoch).permutation(size)
            first, last = max(step * count, epoch * size), min((step + 1) * count, (epoch + 1) * size)
            drawn += [(number, self[int(order[number - epoch * size])]) for number in range(first, last)]
        return drawn


def load_prompts(
    settings: PromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    context_tokens: int,
    max_response_tokens: int,
    key: str,
    section: str,
) -> PromptSet:
    """Read, check and tokenise prompts.

    A string is tokenised as it is, with the special tokens that the tokenizer adds by default and no others.
    Chat messages go through the chat template with its generation prompt. The column is `settings.field`;
    where that is `prompt`, OpenRLHF's `input` is taken too.

    Args:
        max_prompt_tokens: a longer prompt is a bad row.
        context_tokens: position limit of the policy.
        max_response_tokens: prompt and response together must fit the context.
        key: the settings key with the path, such as `prompts.path`.
        section: the settings section with `max_prompt_tokens` and `max_response_tokens`, for messages.

    Raises:
        BadInput: unreadable source, no usable prompt, or (with `on_bad_row: fail`) a bad row.
    """
    bad_rows = BadRows(settings.on_bad_row, f"{key.rpartition('.')[0]}.on_bad_row")
    names = ("prompt", "input") if settings.field == "prompt" else (settings.field,)
    prompts: list[Prompt] = []
    for row in read_rows(settings.path, bad_rows, split=settings.split, limit=settings.limit, key=key):
        try:
            name, value = first_present(row.values, names)
            text, token_ids = encode_prompt(value, name, tokenizer)
            _check_length(len(token_ids), max_prompt_tokens, context_tokens, max_response_tokens, section)
        except RowError as problem:
            bad_rows.add(row.place, problem)
            continue
        messages = tuple(parse_messages(value, name)) if isinstance(value, list) else None
        prompts.append(
            Prompt(len(prompts), np.array(token_ids, dtype=np.int32), text, row.values.get("label"), messages)
        )
    bad_rows.close()
    if not prompts:
        raise BadInput(
            key,
            f"'{settings.path}' has no usable prompt ({bad_rows.count} bad rows, the first {bad_rows.messages[0]})",
            "at least one prompt",
        )
    return PromptSet(prompts, bad_rows)


def encode_prompt(value: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Text and token ids of a prompt as the policy sees it: a string, or chat messages.

    Raises:
        RowError: neither, or empty.
    """
    if isinstance(value, list):
        text = render(tokenizer, parse_messages(value, name), add_generation_prompt=True)
        # The template has written the special tokens already.
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    else:
        text = text_value(value, name)
        token_ids = tokenizer(text, verbose=False).input_ids
    if not token_ids:
        raise RowError(f"`{name}` has no tokens", "a prompt of at least one token")
    return text, token_ids


def _check_length(
    num_tokens: int, max_prompt_tokens: int, context_tokens: int, max_response_tokens: int, section: str
) -> None:
    if num_tokens > max_prompt_tokens:
        raise RowError(
            f"the prompt has {num_tokens} tokens", f"at most {max_prompt_tokens} ({section}.max_prompt_tokens)"
        )
    if num_tokens + max_response_tokens > context_tokens:
        raise RowError(
            f"the prompt has {num_tokens} tokens, with the response {num_tokens + max_response_tokens}",
            f"at most {context_tokens} together, the context of the policy ({section}.max_response_tokens is "
            f"{max_response_tokens})",
        )
