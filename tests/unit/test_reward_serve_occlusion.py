import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.serving import LimitSettings
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.serve.exchange import Answer, ModelInfo, Score, ScoreInput
from rlhf_ray.reward.serve.occlusion import MAX_SPANS, Explanation, Span, explain, merge_spans, occlusions, word_spans
from rlhf_ray.reward.serve.wire.explain import routes

WORDS = ("the", "film", "was", "great", "bad", "don", "t", "'", ".", "not")
WEIGHTS = {"great": 2.5, "bad": -3.0, "not": -0.75, "film": 0.125, "the": 7.0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word, special tokens around, and an unknown one."""
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


class BagOfWords:
    """A service whose score is the sum of the words' weights."""

    def __init__(self, tokenizer: Any, max_length: int = 512) -> None:
        self.tokenizer, self.calls = tokenizer, list[tuple[str | None, int]]()
        self.info = ModelInfo("bag", "v1", 1.0, ("preference",), 1, max_length, "float32", "live", 1.0)

    def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    def detokenize(self, token_ids: Sequence[int], model: str | None = None) -> str:
        return str(self.tokenizer.decode(token_ids))

    async def score(
        self, inputs: Sequence[ScoreInput], *, model: str | None = None, sticky: str | None = None
    ) -> Answer:
        self.calls.append((model, len(inputs)))
        scores = []
        for each in inputs:
            assert each.token_ids
            value = math.fsum(WEIGHTS.get(word, 0.0) for word in self.tokenizer.convert_ids_to_tokens(each.token_ids))
            scores.append(Score(value, {}, 0.0, len(each.token_ids), False))
        return Answer(tuple(scores), self.info)

    async def tokenizing(self, work: Callable[[Any], Any], model: str | None = None) -> Any:
        if model not in (None, "bag", "v1"):
            raise ApiError(ErrorType.NOT_FOUND, "no such model")
        return work(RewardEncoding.for_backbone(self.tokenizer, self.info.max_length))


def explained(
    service: BagOfWords, prompt: str, response: str, limits: LimitSettings | None = None, **options: Any
) -> Explanation:
    return asyncio.run(explain(service, service.tokenizing, limits or LimitSettings(), prompt, response, **options))


def test_contribution_of_a_linear_scorer_is_the_weight(tokenizer: Any) -> None:
    service = BagOfWords(tokenizer)
    explanation = explained(service, "the film", " was not great, bad .")
    assert explanation.score == 7.0 + 0.125 - 0.75 + 2.5 - 3.0
    assert [(word.text, word.contribution) for word in explanation.words if word.scored] == [
        (" was", 0.0),
        (" not", -0.75),
        (" great", 2.5),
        (",", 0.0),
        (" bad", -3.0),
        (" .", 0.0),
    ]
    assert service.calls == [("bag", 7)], "one call, so one version"


def test_pieces_are_the_text_and_the_prompt_is_not_left_out(tokenizer: Any) -> None:
    for prompt, response in [("the film", " was great  "), ("", "great film"), ("the film ", "bad"), ("the", "")]:
        words = explained(BagOfWords(tokenizer), prompt, response).words
        assert "".join(word.text for word in words) == prompt + response
        assert all(word.text == (prompt + response)[word.start : word.end] for word in words)
        assert all(word.scored == (word.start >= len(prompt)) for word in words if word.text.strip())


def test_front_that_was_cut_is_not_left_out(tokenizer: Any) -> None:
    words = explained(BagOfWords(tokenizer, max_length=4), "", "great bad film was").words
    assert [(word.text, word.scored) for word in words] == [("great bad", False), (" film", True), (" was", True)]


def test_variants_are_bounded_and_cover_every_word(tokenizer: Any) -> None:
    service = BagOfWords(tokenizer)
    words = explained(service, "", " ".join(["great"] * 100), max_spans=7).words
    assert service.calls == [("bag", 8)]
    counts = [len(word.text.split()) for word in words]
    assert sum(counts) == 100
    assert max(counts) - min(counts) <= 1
    assert [word.contribution for word in words] == [2.5 * count for count in counts]


def test_long_texts_have_fewer_variants(tokenizer: Any) -> None:
    service = BagOfWords(tokenizer, max_length=8192)
    explained(service, "", " ".join(["film"] * 8000))
    assert service.calls == [("bag", 1 + 3)]


def test_an_explanation_keeps_to_what_one_request_may_ask_for(tokenizer: Any) -> None:
    for limits, texts in ((LimitSettings(max_texts=5), 5), (LimitSettings(max_tokens=1000), 9), (LimitSettings(), 65)):
        service = BagOfWords(tokenizer)
        words = explained(service, "", " ".join(["film"] * 100), limits).words
        assert service.calls == [("bag", texts)]
        assert "".join(word.text for word in words) == " ".join(["film"] * 100)
    assert len(explained(BagOfWords(tokenizer), "", "film " * 40_000).words) == MAX_SPANS + 1


def test_apostrophes_do_not_part_a_word_and_unknown_words_are_words(tokenizer: Any) -> None:
    words = explained(BagOfWords(tokenizer), "", "don't unheard-of").words
    assert [word.text for word in words] == ["don't", " unheard", "-", "of"]


def test_words_of_a_byte_level_tokenizer(tiny: Path) -> None:
    own = load_tokenizer(str(tiny / "reward_model"), "reward.model")
    text = "The movie wasn't  bad, café 日本."
    token_ids = own(text).input_ids
    spans = word_spans(text, [*token_ids, own.eos_token_id], own)
    assert [text[span.start : span.end].strip() for span in spans] == [
        "The", "movie", "wasn't", "bad", ",", "café", "日本", "."
    ]  # fmt: skip
    assert [span.first for span in spans[1:]] == [span.last for span in spans[:-1]], "every token is in one word"
    assert (spans[0].first, spans[-1].last) == (0, len(token_ids)), "but the end-of-sequence token is in none"
    without = occlusions(token_ids, spans)
    assert own.decode(without[1]) == "The wasn't  bad, café 日本."


def test_merging_none_gives_none() -> None:
    assert merge_spans([], 5) == []
    assert merge_spans([Span(1, 2, 0, 3)], 5) == [Span(1, 2, 0, 3)]


def test_route(tokenizer: Any) -> None:
    app = FastAPI()
    service = BagOfWords(tokenizer)
    app.include_router(routes(service, service.tokenizing, LimitSettings()))
    client = TestClient(app)
    answer = client.post("/v1/explain", json={"prompt": "the", "response": " great film", "model": "v1"}).json()
    assert answer == {
        "model": {"name": "bag", "version": "v1", "temperature": 1.0, "attributes": ["preference"]},
        "score": 7.0 + 2.5 + 0.125,
        "words": [
            {"text": "the", "contribution": 0.0, "scored": False},
            {"text": " great", "contribution": 2.5, "scored": True},
            {"text": " film", "contribution": 0.125, "scored": True},
        ],
    }
    for body, kind in (
        ({"prompt": "the", "response": "great", "model": "other"}, ErrorType.NOT_FOUND),
        ({"prompt": "the", "response": "great", "more": 1}, ErrorType.BAD_REQUEST),
    ):
        with pytest.raises(ApiError) as refused:
            client.post("/v1/explain", json=body)
        assert refused.value.type is kind
