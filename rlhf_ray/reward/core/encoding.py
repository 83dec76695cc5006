"""From texts and conversations to the tokens that a reward model scores: once, for training, judgement and service."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_ray.data.chat import Message, end_at_eos, render
from rlhf_ray.reward.core.card import RewardModelCard

_CHARACTERS_A_TOKEN = 16
_EDGE_CHARACTERS, _EDGE_TOKENS = 256, 16
"""At either side of a cut, tokens are not those of the whole text."""
_LONGEST_WORD = 1 << 17
"""Of longer ones the tokens at the cut end may be others than in the whole text."""
_WORD_ENDS = re.compile(r"(?<=\w)\s|[^\w\s](?=\w)")
"""Tokens do not reach across these."""

Encoded = tuple[list[int], bool]
"""Token ids as the model is given them, and whether the text was cut."""


@dataclass(frozen=True)
class RewardEncoding:
    """A reward model's tokenizer with its template, and the rules of how texts end and are cut.

    Attributes:
        tokenizer: of the model.
        max_length: longest text in tokens.
        append_eos: put the end-of-sequence token behind texts that do not end in it. Decoders are read at the last
            token, and their tokenizers usually add none; encoders bring their own special tokens.
        as_rendered: what a chat template has rendered is scored as it is. Models that were published without a card
            were trained so, and ChatML and Gemma end in white space behind the token that ends a turn. Ours end where
            a policy stops, at the end-of-sequence token.
    """

    tokenizer: Any
    max_length: int
    append_eos: bool
    as_rendered: bool = False

    @classmethod
    def for_backbone(cls, tokenizer: Any, max_length: int) -> RewardEncoding:
        """Of a model that is trained here."""
        own = tokenizer("").input_ids
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        return cls(tokenizer, max_length, append_eos=not own or own[-1] not in ends)

    @classmethod
    def of_model(cls, tokenizer: Any, card: RewardModelCard | None, max_length: int) -> RewardEncoding:
        """Of a trained model: as its card says, else as published models were trained."""
        encoding = RewardEncoding.for_backbone(tokenizer, max_length)
        if card is None:
            return replace(encoding, as_rendered=True)
        return replace(encoding, append_eos=card.append_eos)

    def encode(
        self,
        text: str,
        *,
        templated: bool = False,
        max_tokens: int | None = None,
        keep: Literal["end", "start"] = "end",
    ) -> Encoded:
        """A whole text.

        Args:
            templated: a chat template has written the special tokens already.
            max_tokens: cut to fewer than the model takes.
            keep: which end of a text that is too long is scored; training keeps the end.
        """
        limit = self.max_length if max_tokens is None else min(max_tokens, self.max_length)
        text = self._without_middle(text, limit, keep)
        if keep == "end" and limit == self.max_length:
            return self._whole(text, templated)
        whole, _ = replace(self, max_length=sys.maxsize)._whole(text, templated)
        return _cut(whole, limit, keep), len(whole) > limit

    def decisive(self, text: str, limit: int, keep: Literal["end", "start"] = "end") -> str:
        """The end of a text that is kept, with more tokens than are scored, whatever is beyond it; the whole of a text
        that is not much longer."""
        size = _CHARACTERS_A_TOKEN * limit
        while len(text) > size + _EDGE_CHARACTERS:
            part = _after_a_word(text[-size:]) if keep == "end" else _up_to_a_word(text[:size])
            if len(self.tokenizer(part, add_special_tokens=False, verbose=False).input_ids) > limit + _EDGE_TOKENS:
                return part
            size *= 4
        return text

    def _without_middle(self, text: str, limit: int, keep: Literal["end", "start"]) -> str:
        """What a text that will be cut is cut from: a tokenizer takes 200 bytes of memory for each character, and
        megabytes of text are sent to services. The first and the last tokens stay what they are."""
        part = self.decisive(text, limit, keep)
        if part is text:
            return text
        return text[:_EDGE_CHARACTERS] + part if keep == "end" else part + text[-_EDGE_CHARACTERS:]

    def encode_messages(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        keep: Literal["end", "start"] = "end",
    ) -> Encoded:
        """A conversation that ends with the response. Where the model has no chat template, a user's turn and its
        answer are prompt and response.

        Args:
            max_tokens, keep: as for `encode`.

        Raises:
            RowError: there is no chat template for any other conversation, or it does not take this one.
        """
        if self.tokenizer.chat_template is None and [each["role"] for each in messages] == ["user", "assistant"]:
            text = "".join(str(each["content"]) for each in messages)
            return self.encode(text, max_tokens=max_tokens, keep=keep)
        text = render(self.tokenizer, messages, add_generation_prompt=False)
        return self.encode(text, templated=True, max_tokens=max_tokens, keep=keep)

    def encode_turn(self, prompt: str | Sequence[Message], response: str) -> Encoded:
        """A prompt (text or chat messages) and the response to it.

        Raises:
            RowError: as `encode_messages`.
        """
        if isinstance(prompt, str):
            return self.encode(prompt + response)
        return self.encode_messages([*prompt, {"role": "assistant", "content": response}])

    def finish(self, token_ids: list[int]) -> Encoded:
        """Token ids of a whole text, ended as the model expects and cut at the front to the maximum."""
        if self.append_eos and (not token_ids or token_ids[-1] != self.tokenizer.eos_token_id):
            token_ids = [*token_ids, self.tokenizer.eos_token_id]
        return self._cut_front(token_ids)

    def _whole(self, text: str, templated: bool) -> Encoded:
        """A text, cut at the front; the special tokens around it are kept."""
        if templated:
            ended = text if self.as_rendered else end_at_eos(self.tokenizer, text)
            token_ids = self.tokenizer(ended, add_special_tokens=False, verbose=False).input_ids
            return self._cut_front(token_ids) if self.as_rendered else self.finish(token_ids)
        token_ids = self.tokenizer(text, verbose=False).input_ids
        if len(token_ids) > self.max_length and not self.append_eos:
            self.tokenizer.truncation_side = "left"
            return self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids, True
        return self.finish(token_ids)

    def _cut_front(self, token_ids: list[int]) -> Encoded:
        if len(token_ids) <= self.max_length:
            return token_ids, False
        # A text that begins with the beginning-of-sequence token still does when its front is cut.
        start = token_ids[:1] if token_ids[0] == self.tokenizer.bos_token_id else []
        return [*start, *token_ids[len(token_ids) - self.max_length + len(start) :]], True


def _after_a_word(text: str) -> str:
    """From the first end of a word; nothing where there is none and the word may be longer."""
    found = _WORD_ENDS.search(text)
    return text[found.start() :] if found else text if len(text) > _LONGEST_WORD else ""


def _up_to_a_word(text: str) -> str:
    """As `_after_a_word`, at the other end."""
    ends = [found.end() for found in _WORD_ENDS.finditer(text, max(len(text) - _LONGEST_WORD, 0))]
    return text[: ends[-1]] if ends else text if len(text) > _LONGEST_WORD else ""


def _cut(token_ids: list[int], limit: int, keep: Literal["end", "start"]) -> list[int]:
    """Ended token ids, cut at the other end than `keep`; the first and the last token stay."""
    if len(token_ids) <= limit:
        return token_ids
    if keep == "start":
        return [*token_ids[: limit - 1], token_ids[-1]]
    return [token_ids[0], *token_ids[len(token_ids) - limit + 1 :]]
