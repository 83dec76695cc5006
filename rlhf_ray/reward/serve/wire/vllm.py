"""vLLM's pooling routes, with those of verl and SGLang, which share its paths.

vLLM applies the activation unless it is told not to, and with one label that is a sigmoid; so does this. There is one
label for every model: the aggregated score. A pair of texts (`/score`, `/rerank`) is scored as prompt and response, one
after the other: reward models read them so.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictBool, StrictInt
from typing_extensions import TypedDict

from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.context import speaks
from rlhf_ray.reward.serve.exchange import Answer, ScoreInput, Service
from rlhf_ray.reward.serve.wire import tei
from rlhf_ray.reward.serve.wire.bodies import Lenient, Several, checked, read_body, read_json, scored, sigmoid
from rlhf_ray.reward.serve.wire.rollouts import Message, conversation, sticky_key

TokenIds = Several[StrictInt]


class Common(Lenient):
    """What all of vLLM's pooling requests may have."""

    model: str | None = None
    use_activation: StrictBool | None = None
    activation: StrictBool | None = None
    truncate_prompt_tokens: StrictInt | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    request_id: str | None = None
    priority: int = 0
    user: str | None = None

    chat_template: None = Field(None, description="Not taken: the model's own is part of what it was trained with.")

    @property
    def activated(self) -> bool:
        # Older servers called it `activation`, and verl still does where it finds one.
        return self.use_activation is not False and self.activation is not False


class PoolingRequest(Common):
    """`/classify`, `/pooling` and `/v1/embeddings`: texts, tokens, or a conversation."""

    input: str | Several[str] | TokenIds | Several[TokenIds] | None = None
    messages: Several[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    task: Literal["classify", "score", "reward"] | None = None
    encoding_format: Literal["float"] = "float"


class SGLangRequest(Lenient):
    """SGLang's `/classify`."""

    text: str | Several[str]
    model: str | None = None


class ScoreRequest(Common):
    """`/score`: 1:1, 1:N or N:N under any of vLLM's names."""

    queries: str | Several[str] | None = None
    documents: str | Several[str] | None = None
    items: str | Several[str] | None = None
    data_1: str | Several[str] | None = None
    data_2: str | Several[str] | None = None
    text_1: str | Several[str] | None = None
    text_2: str | Several[str] | None = None


class RerankRequest(Common):
    """`/rerank` in Jina's and Cohere's form."""

    query: str
    documents: str | Several[str]
    top_n: StrictInt = Field(0, ge=0)


class Usage(TypedDict):
    """Tokens that were scored; none is made."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None


class Classification(TypedDict):
    """The only label's score of one input."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Pooled(TypedDict):
    """The score of one input."""

    index: int
    object: Literal["pooling"]
    data: list[float]


class Embedded(TypedDict):
    """The raw score of one input."""

    index: int
    object: Literal["embedding"]
    embedding: list[float]


class PairScore(TypedDict):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


Row = TypeVar("Row")


class Listed(TypedDict, Generic[Row]):
    """vLLM's envelope of a list."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Row]
    usage: Usage


class RankedDocument(TypedDict):
    """A document as it was sent."""

    text: str


class Rank(TypedDict):
    """A document, its place in the request, and its score."""

    index: int
    document: RankedDocument
    relevance_score: float


class RerankAnswer(TypedDict):
    """Documents, the best first."""

    id: str
    model: str
    usage: Usage
    results: list[Rank]


class SGLangMeta(TypedDict):
    """What was scored."""

    prompt_tokens: int


class SGLangRow(TypedDict):
    """The raw score of one text."""

    embedding: list[float]
    meta_info: SGLangMeta


def routes(service: Service) -> APIRouter:
    """All paths of vLLM; `/classify` and `/rerank` belong to others too, and the body decides."""
    router = APIRouter(tags=["vLLM, verl, SGLang"])

    @router.post(
        "/classify",
        summary="vLLM, verl (`input`, `messages`) and SGLang (`text`)",
        response_model=Listed[Classification] | list[SGLangRow] | SGLangRow,
    )
    async def classify(request: Request) -> Response:
        """One label, the score: `data[].probs[0]`; SGLang's form gets `[{"embedding": [score]}]`."""
        value = await read_json(request)
        if isinstance(value, dict) and "text" in value and not {"input", "messages"} & value.keys():
            speaks("sglang")
            return await _sglang(service, checked(SGLangRequest, value))
        body = checked(PoolingRequest, value)
        answer = await _pooled(service, body)
        data = [
            Classification(index=index, label="LABEL_0", probs=[value], num_classes=1)
            for index, value in enumerate(_values(answer, body.activated))
        ]
        return _listed("classify", data, answer, body)

    @router.post("/pooling", summary="vLLM", response_model=Listed[Pooled])
    async def pooling(request: Request) -> Response:
        """The score of each input as `data[].data[0]`."""
        body = await read_body(request, PoolingRequest)
        answer = await _pooled(service, body)
        data = [
            Pooled(index=index, object="pooling", data=[value])
            for index, value in enumerate(_values(answer, body.activated))
        ]
        return _listed("pool", data, answer, body)

    @router.post("/v1/embeddings", summary="verl's other mode", response_model=Listed[Embedded])
    async def embeddings(request: Request) -> Response:
        """The raw score of each input as `data[].embedding[0]`; an embedding has no activation."""
        body = (await read_body(request, PoolingRequest)).model_copy(update={"use_activation": False})
        answer = await _pooled(service, body)
        data = [
            Embedded(index=index, object="embedding", embedding=[value])
            for index, value in enumerate(_values(answer, False))
        ]
        return _listed("embd", data, answer, body)

    async def score(request: Request) -> Response:
        """The score of each pair."""
        body = await read_body(request, ScoreRequest)
        pairs = _pairs(body)
        texts = [_input(a + b, body) for a, b in pairs]
        answer = await service.score(texts, model=body.model, sticky=sticky_key(pairs[0][0]))
        data = [
            PairScore(index=index, object="score", score=value)
            for index, value in enumerate(_values(answer, body.activated))
        ]
        return _listed("score", data, answer, body)

    async def rerank(request: Request) -> Response:
        """Documents in the order of their scores."""
        value = await read_json(request)
        if isinstance(value, dict) and "texts" in value and "documents" not in value:
            speaks("tei")
            return await tei.rerank(service, value)
        body = checked(RerankRequest, value)
        documents = [body.documents] if isinstance(body.documents, str) else body.documents
        if not documents:
            raise ApiError(ErrorType.BAD_REQUEST, "documents: at least one")
        texts = [_input(body.query + each, body) for each in documents]
        answer = await service.score(texts, model=body.model, sticky=sticky_key(body.query))
        values = _values(answer, body.activated)
        order = sorted(range(len(values)), key=lambda index: -values[index])
        results = [
            Rank(index=index, document={"text": documents[index]}, relevance_score=values[index])
            for index in order[: body.top_n or None]
        ]
        content = RerankAnswer(
            id=f"rerank-{uuid.uuid4().hex}", model=answer.model.name, usage=_usage(answer), results=results
        )
        return scored(content, answer, _scale(body.activated))

    for path in ("/score", "/v1/score"):
        router.post(path, summary="vLLM", response_model=Listed[PairScore])(score)
    router.post(
        "/rerank",
        summary="vLLM (`documents`) and Text Embeddings Inference (`texts`)",
        response_model=RerankAnswer | list[tei.TEIRank],
    )(rerank)
    for path in ("/v1/rerank", "/v2/rerank"):
        router.post(path, summary="vLLM", response_model=RerankAnswer)(rerank)
    return router


async def _pooled(service: Service, body: PoolingRequest) -> Answer:
    """Scores of texts, whose prompts nobody tells, or of a conversation."""
    sticky = sticky_key(body.messages[:-1]) if body.messages else None
    return await service.score(_inputs(body), model=body.model, sticky=sticky)


async def _sglang(service: Service, body: SGLangRequest) -> Response:
    texts = [body.text] if isinstance(body.text, str) else body.text
    answer = await service.score([ScoreInput(text=text) for text in texts], model=body.model)
    content = [
        SGLangRow(embedding=[score.score], meta_info={"prompt_tokens": score.num_tokens}) for score in answer.scores
    ]
    return scored(content if isinstance(body.text, list) else content[0], answer)


def _inputs(body: PoolingRequest) -> list[ScoreInput]:
    if (body.input is None) == (body.messages is None):
        raise ApiError(ErrorType.BAD_REQUEST, "exactly one of input and messages is needed")
    if body.messages is not None:
        if body.add_generation_prompt:
            raise ApiError(ErrorType.BAD_REQUEST, "add_generation_prompt: the response is there, it is scored")
        return [_limited(conversation(body.messages), body)]
    if isinstance(body.input, str):
        return [_input(body.input, body)]
    given: list[Any] = list(body.input or ())
    if not given:
        raise ApiError(ErrorType.BAD_REQUEST, "input: it is empty")
    if isinstance(given[0], int):
        return [_limited(ScoreInput(token_ids=tuple(given)), body)]
    if isinstance(given[0], str):
        return [_input(text, body) for text in given]
    return [_limited(ScoreInput(token_ids=tuple(ids)), body) for ids in given]


def _input(text: str, body: Common) -> ScoreInput:
    templated = isinstance(body, PoolingRequest) and body.add_special_tokens is False
    return _limited(ScoreInput(text=text, templated=templated), body)


def _limited(given: ScoreInput, body: Common) -> ScoreInput:
    """With vLLM's rule: a text that is too long is an error unless the request says how to cut it."""
    limit = body.truncate_prompt_tokens
    if limit == 0:
        raise ApiError(ErrorType.BAD_REQUEST, "truncate_prompt_tokens: -1 for the model's limit, or at least 1")
    return ScoreInput(
        text=given.text,
        token_ids=given.token_ids,
        messages=given.messages,
        templated=given.templated,
        max_tokens=limit if limit is not None and limit > 0 else None,
        # Cutting the right end is the default of vLLM's pooling models.
        keep="end" if body.truncation_side == "left" else "start",
        on_too_long="fail" if limit is None else "truncate",
    )


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    ways = (
        (body.queries, body.documents),
        (body.queries, body.items),
        (body.data_1, body.data_2),
        (body.text_1, body.text_2),
    )
    given = [(a, b) for a, b in ways if a is not None and b is not None]
    if len(given) != 1:
        names = "queries and documents, queries and items, data_1 and data_2, or text_1 and text_2"
        raise ApiError(ErrorType.BAD_REQUEST, f"exactly one pair of fields is needed: {names}")
    first, second = ([each] if isinstance(each, str) else each for each in given[0])
    if not first or not second:
        raise ApiError(ErrorType.BAD_REQUEST, "at least one text on each side")
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ApiError(ErrorType.BAD_REQUEST, f"{len(first)} texts against {len(second)}: 1:1, 1:N or N:N is taken")
    return list(zip(first, second, strict=True))


def _values(answer: Answer, activated: bool) -> list[float]:
    return [sigmoid(score.score) if activated else score.score for score in answer.scores]


def _scale(activated: bool) -> str:
    return "probability" if activated else "raw"


def _usage(answer: Answer) -> Usage:
    tokens = sum(score.num_tokens for score in answer.scores)
    return Usage(prompt_tokens=tokens, total_tokens=tokens, completion_tokens=0, prompt_tokens_details=None)


def _listed(kind: str, data: list[Row], answer: Answer, body: Common) -> Response:
    content: Listed[Row] = {
        "id": f"{kind}-{body.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": answer.model.name,
        "data": data,
        "usage": _usage(answer),
    }
    return scored(content, answer, _scale(body.activated))
