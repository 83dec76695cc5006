"""Text for the supervised warm-up.

Prompt and response are tokenised apart, because at rollout the policy is given the tokens of the prompt
and continues with tokens of its own: no token ever spans the boundary. Training sees the same boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.settings import TextSettings
from rlhf_ray.data.chat import end_at_eos, parse_messages, render_turn
from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.data.rows import BadRows, RowError, first_present, read_rows, text_value
from rlhf_ray.failures import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_NAMES = ("prompt", "input")
RESPONSE_NAMES = ("response", "completion", "output")


@dataclass(frozen=True)
class TextExample:
    """One row of training text.

    Attributes:
        token_ids: `[n]` int32.
        learn_from: tokens from this index on are learned, the others are only context. 1 for plain text,
            whose first token has nothing to be predicted from; else the number of prompt tokens.
    """

    token_ids: NDArray[np.int32]
    learn_from: int


@dataclass(frozen=True)
class TextSet:
    """Training text in the order of its rows.

    Attributes:
        examples: at least one.
        num_skipped: rows left out, bad or (with `on_too_long: skip`) too long.
        num_truncated: rows cut at `max_tokens`.
        bad_rows: the bad ones among those left out.
    """

    examples: tuple[TextExample, ...]
    num_skipped: int
    num_truncated: int
    bad_rows: BadRows


def load_text(
    settings: TextSettings, tokenizer: PreTrainedTokenizerBase, context_tokens: int, key: str = "text.path"
) -> TextSet:
    """Read, check and tokenise training text.

    Rows have `text`; or `prompt` and `response` (TRL's `completion` and OpenRLHF's `input` and `output` are
    taken too), strings or chat messages; or `messages`, the last of which is the assistant's. The
    end-of-sequence token is put behind every text that does not have it, except where the text is cut.

    Args:
        context_tokens: that the model takes.
        key: the settings key with the path.

    Raises:
        BadInput: unreadable source, no usable row, a tokenizer without an end-of-sequence token, rows that may be
            longer than the model takes, or (with `fail`) a bad or too long row.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("policy.model", "its tokenizer has no end-of-sequence token", "a tokenizer with `eos_token`")
    section = key.rpartition(".")[0]
    if settings.max_tokens > context_tokens:
        found = f"{settings.max_tokens} tokens"
        raise BadInput(f"{section}.max_tokens", found, f"at most {context_tokens}, the model's limit")
    bad_rows = BadRows(settings.on_bad_row, f"{section}.on_bad_row")
    too_long = BadRows("fail" if settings.on_too_long == "fail" else "skip", f"{section}.on_too_long")
    examples: list[TextExample] = []
    num_truncated = 0
    for row in read_rows(settings.path, bad_rows, split=settings.split, limit=settings.limit, key=key):
        try:
            token_ids, learn_from = _encode(row.values, tokenizer)
            if not token_ids:
                raise RowError("the text has no tokens", "a text of at least one token")
            if token_ids[-1] != tokenizer.eos_token_id:
                token_ids = [*token_ids, tokenizer.eos_token_id]
            if len(token_ids) > settings.max_tokens:
                problem = RowError(
                    f"the text has {len(token_ids)} tokens", f"at most {settings.max_tokens} ({section}.max_tokens)"
                )
                if settings.on_too_long != "truncate":
                    too_long.add(row.place, problem)
                    continue
                if learn_from >= settings.max_tokens:
                    raise RowError(
                        f"the prompt alone has {learn_from} tokens",
                        f"fewer than {settings.max_tokens} ({section}.max_tokens)",
                    )
                num_truncated += 1
                token_ids = token_ids[: settings.max_tokens]
        except RowError as problem:
            bad_rows.add(row.place, problem)
            continue
        examples.append(TextExample(np.array(token_ids, dtype=np.int32), learn_from))
    bad_rows.close()
    too_long.close()
    if not examples:
        first = (bad_rows.messages + too_long.messages)[0]
        raise BadInput(key, f"'{settings.path}' has no usable row (the first: {first})", "at least one text")
    return TextSet(tuple(examples), bad_rows.count + too_long.count, num_truncated, bad_rows)


def _encode(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids and the index from which they are learned."""
    if "messages" in values:
        messages = parse_messages(values["messages"], "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RowError(
                "`messages` does not end with an answer", "messages of which the last has the role assistant"
            )
        return _encode_turn(messages[:-1], messages[-1:], tokenizer)
    if "text" in values:
        token_ids = tokenizer(text_value(values["text"], "text"), verbose=False).input_ids
        return token_ids, 1
    if not any(name in values for name in PROMPT_NAMES):
        first_present(values, ("text", "prompt", "messages"))
    prompt_name, prompt = first_present(values, PROMPT_NAMES)
    response_name, response = first_present(values, RESPONSE_NAMES)
    if isinstance(prompt, list):
        answer = (
            parse_messages(response, response_name)
            if isinstance(response, list)
            else [{"role": "assistant", "content": text_value(response, response_name)}]
        )
        return _encode_turn(parse_messages(prompt, prompt_name), answer, tokenizer)
    _, prompt_ids = encode_prompt(prompt, prompt_name, tokenizer)
    response_text = text_value(response, response_name)
    return prompt_ids + _plain_ids(response_text, tokenizer), len(prompt_ids)


def _encode_turn(
    prompt: list[dict[str, Any]], response: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], int]:
    prompt_text, response_text = render_turn(tokenizer, prompt, response)
    if not response[-1]["content"].strip():
        raise RowError("the answer is empty", "an answer that is not blank")
    prompt_ids = _plain_ids(prompt_text, tokenizer)
    return prompt_ids + _plain_ids(end_at_eos(tokenizer, response_text), tokenizer), len(prompt_ids)


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return token_ids
