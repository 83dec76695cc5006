"""Text Embeddings Inference's routes for classifiers and rerankers.

A trap of its protocol: `["a", "b"]` is one pair of texts; a batch of two is `[["a"], ["b"]]`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import StrictBool
from typing_extensions import TypedDict

from rlhf_ray.config.serving import BatchingSettings, LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.exchange import Score, ScoreInput, Service
from rlhf_ray.reward.serve.wire.bodies import Lenient, Several, checked, plain, read_body, scored, sigmoid
from rlhf_ray.reward.serve.wire.rollouts import sticky_key

try:
    _VERSION = version("rlhf-ray")
except PackageNotFoundError:  # run from its sources
    _VERSION = "0"


class _Cut(Lenient):
    raw_scores: StrictBool = False
    truncate: StrictBool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] = "Right"


class PredictRequest(_Cut):
    """`/predict`: a text, a pair of texts, or a batch of either."""

    inputs: str | Several[str] | Several[Several[str]]


class TEIRerankRequest(_Cut):
    """`/rerank` with `texts`."""

    query: str
    texts: Several[str]
    return_text: StrictBool = False


class Prediction(TypedDict):
    """The only label and its score."""

    score: float
    label: str


class TEIRank(TypedDict):
    """A text's place in the request, and its score; the text itself where it was asked for."""

    index: int
    score: float
    text: NotRequired[str]


class Info(TypedDict):
    """The model with the largest share, and the limits, in TEI's words."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, dict[str, dict[str, str | int]]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


def routes(service: Service, limits: LimitSettings, batching: BatchingSettings) -> APIRouter:
    """`/predict` and `/info`."""
    router = APIRouter(tags=["Text Embeddings Inference"])

    @router.post(
        "/predict",
        summary="Text Embeddings Inference",
        response_model=list[Prediction] | list[list[Prediction]],
    )
    async def predict(request: Request) -> Response:
        """One label, the score."""
        body = await read_body(request, PredictRequest)
        batch = isinstance(body.inputs, list) and bool(body.inputs) and isinstance(body.inputs[0], list)
        groups: Any = body.inputs if batch else [[body.inputs] if isinstance(body.inputs, str) else body.inputs]
        for group in groups:
            if len(group) not in (1, 2):
                raise ApiError(ErrorType.BAD_REQUEST, "inputs: a text or a pair of texts; a batch is a list of lists")
        answer = await service.score([_input("".join(group), body) for group in groups])
        rows = [[Prediction(score=_value(score, body), label="LABEL_0")] for score in answer.scores]
        return scored(rows if batch else rows[0], answer, "raw" if body.raw_scores else "probability", tei=True)

    @router.get("/info", summary="Text Embeddings Inference", response_model=Info)
    async def info() -> Response:
        """The model with the largest share, and the limits."""
        model = service.models()[0]
        return plain(
            Info(
                model_id=model.name,
                model_sha=model.version,
                model_dtype=model.dtype,
                model_type={"classifier": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
                max_concurrent_requests=limits.max_queued_requests,
                max_input_length=model.max_length,
                max_batch_tokens=batching.max_tokens,
                max_batch_requests=batching.max_texts,
                max_client_batch_size=limits.max_texts,
                auto_truncate=False,
                tokenization_workers=1,
                version=_VERSION,
                sha=None,
                docker_label=None,
            )
        )

    return router


async def rerank(service: Service, value: Any) -> Response:
    """`/rerank` in TEI's form."""
    body = checked(TEIRerankRequest, value)
    if not body.texts:
        raise ApiError(ErrorType.BAD_REQUEST, "texts: at least one")
    texts = [_input(body.query + text, body) for text in body.texts]
    answer = await service.score(texts, sticky=sticky_key(body.query))
    order = sorted(range(len(body.texts)), key=lambda index: -answer.scores[index].score)
    ranks = [TEIRank(index=index, score=_value(answer.scores[index], body)) for index in order]
    if body.return_text:
        for rank in ranks:
            rank["text"] = body.texts[rank["index"]]
    return scored(ranks, answer, "raw" if body.raw_scores else "probability", tei=True)


def _input(text: str, body: _Cut) -> ScoreInput:
    keep: Literal["start", "end"] = "start" if body.truncation_direction.lower() == "right" else "end"
    return ScoreInput(text=text, keep=keep, on_too_long="truncate" if body.truncate else "fail")


def _value(score: Score, body: _Cut) -> float:
    return score.score if body.raw_scores else sigmoid(score.score)
