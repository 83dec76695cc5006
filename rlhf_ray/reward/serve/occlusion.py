"""Which words move a score: leave each out, and score the rest.

A word's contribution is score(whole) − score(without it). Its tokens are removed, not masked: decoders have no mask,
and a classifier's fine-tuning has seen none, while a text that lacks a word is one that somebody could have written.
The limits of it: what stands behind a removed word moves up, words that only matter together (two negations) each
seem to matter little, and the contributions do not add up to the score.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from rlhf_ray.config.serving import LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.serve.exchange import ModelInfo, ScoreInput, Service

MAX_SPANS = 64
"""Most variants of a text that are scored."""
MAX_TOKENS = 32768
"""Most tokens of all variants together: of long texts several words are left out at a time."""
Result = TypeVar("Result")
_APOSTROPHES = frozenset("'’")


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are left out together, and the characters they stand for.

    Attributes:
        first, last: positions of the first token and of that behind the last.
        start, end: of the first character and of that behind the last.
    """

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True)
class Word:
    """A piece of the text; all pieces in a row are the text.

    Attributes:
        text: with the white space before it.
        contribution: how much it raises the score, on the raw scale; 0 where it was not left out.
        scored: whether it was left out: the prompt is not, nor what the model did not see.
        start, end: of its characters.
    """

    text: str
    contribution: float
    scored: bool
    start: int
    end: int


@dataclass(frozen=True)
class Explanation:
    """A text's score and what its words do to it, all by one version of one model.

    Attributes:
        score: of the whole text, on the raw scale.
        words: pieces of prompt and response in their order.
        model: which scored.
    """

    score: float
    words: tuple[Word, ...]
    model: ModelInfo


def word_spans(text: str, token_ids: Sequence[int], tokenizer: Any, start: int = 0, front: int = 0) -> list[Span]:
    """The words of a text as the model sees it.

    A word ends where white space follows, or where the tokenizer ends one; apostrophes do not part a word.

    Args:
        token_ids: of the text as scored, perhaps cut at the front; special tokens belong to no word.
        tokenizer: a fast one, which knows the characters of each token.
        start: the first character whose words are wanted.
        front: characters in front of all tokens.
    """
    whole = tokenizer(text[front:], return_offsets_mapping=True, verbose=False)
    words = whole.word_ids()
    # Not all that the tokenizer calls special: an unknown word is a word.
    special = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    }
    kept = [position for position, token in enumerate(token_ids) if token not in special]
    seen = [place for place, token in enumerate(whole.input_ids) if token not in special]
    spans: list[Span] = []
    previous_word: int | None = None
    # The front was cut, so the tokens that are left are the last ones.
    for position, place in zip(kept, seen[len(seen) - len(kept) :], strict=True):
        begin, end = (front + offset for offset in whole.offset_mapping[place])
        word = words[place]
        if end <= start:
            continue
        begin = max(begin, start)
        if spans and _belongs(text, spans[-1], begin, word is not None and word == previous_word):
            spans[-1] = Span(spans[-1].first, position + 1, spans[-1].start, max(end, spans[-1].end))
        else:
            spans.append(Span(position, position + 1, begin, end))
        previous_word = word
    return spans


def _belongs(text: str, span: Span, begin: int, same_word: bool) -> bool:
    """Whether a token that begins at a character goes on with the word before it."""
    if text[span.start : span.end].isspace():
        return True
    between = text[span.end : begin + 1]
    if between != between.strip():
        return False
    return same_word or text[begin - 1] in _APOSTROPHES or text[begin] in _APOSTROPHES


def merge_spans(spans: Sequence[Span], most: int) -> list[Span]:
    """At most so many spans, neighbours joined into groups that differ by one word at most."""
    groups = np.array_split(np.arange(len(spans)), max(1, min(most, len(spans))))
    joined = [(spans[group[0]], spans[group[-1]]) for group in groups if len(group)]
    return [Span(first.first, last.last, first.start, last.end) for first, last in joined]


def occlusions(token_ids: Sequence[int], spans: Sequence[Span]) -> list[tuple[int, ...]]:
    """The text without each of the spans."""
    return [(*token_ids[: span.first], *token_ids[span.last :]) for span in spans]


class Tokenizing(Protocol):
    """Lets a function read texts as a model does, where it holds nobody up."""

    def __call__(self, work: Callable[[RewardTexts], Result], model: str | None = None) -> Awaitable[Result]:
        """The function's result.

        Args:
            model: name or version; None is the model with the largest share.

        Raises:
            ApiError: there is no such model; or as the function.
        """


async def explain(
    service: Service,
    tokenizing: Tokenizing,
    limits: LimitSettings,
    prompt: str,
    response: str,
    model: str | None = None,
    max_spans: int = MAX_SPANS,
) -> Explanation:
    """Score a text, and again without each word of the response.

    Args:
        limits: of one request; the explanation keeps to them.
        model: name or version; None is the model with the largest share.
        max_spans: most variants; where there are more words, neighbours are left out together.

    Raises:
        ApiError: the text cannot be scored.
    """
    text = prompt + response

    def read(texts: RewardTexts) -> tuple[list[int], list[Span]]:
        if not texts.tokenizer.is_fast:
            raise ApiError(
                ErrorType.UNSCORABLE, "the model's tokenizer does not say which characters a token stands for"
            )
        token_ids, _ = texts.encode(text)
        affordable = min(MAX_TOKENS, limits.max_tokens) // max(1, len(token_ids)) - 1
        most = max(1, min(max_spans, limits.max_texts - 1, affordable))
        front = len(text) - len(texts.decisive(text, texts.max_length))
        return token_ids, merge_spans(word_spans(text, token_ids, texts.tokenizer, len(prompt), front), most)

    token_ids, spans = await tokenizing(read, model)
    inputs = [ScoreInput(token_ids=ids) for ids in (tuple(token_ids), *occlusions(token_ids, spans))]
    answer = await service.score(inputs, model=model or service.models()[0].name)
    whole, *without = [score.score for score in answer.scores]
    words = _pieces(text, len(prompt), spans, [whole - each for each in without])
    return Explanation(whole, tuple(words), answer.model)


def _pieces(text: str, prompt_end: int, spans: Sequence[Span], contributions: Sequence[float]) -> list[Word]:
    """The whole text in pieces: the prompt, what was cut, the words, and white space at the end."""
    words: list[Word] = []

    def add(end: int, contribution: float = 0.0, scored: bool = False) -> None:
        start = words[-1].end if words else 0
        if end > start:
            words.append(Word(text[start:end], contribution, scored, start, end))

    add(prompt_end)
    if spans:
        unseen = text[prompt_end : spans[0].start].rstrip()
        add(prompt_end + len(unseen))
    for span, contribution in zip(spans, contributions, strict=True):
        add(span.end, contribution, scored=True)
    add(len(text))
    return words
