"""Text Embeddings Inference's routes for classifiers and rerankers.

A trap of its protocol: `["a", "b"]` is one pair of texts; a batch of two is `[["a"], ["b"]]`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import StrictBool

from rlhf_ray.config.serving import BatchingSettings, LimitSettings
from rlhf_ray.serving.errors import ApiError, ErrorType
from rlhf_ray.serving.exchange import Score, ScoreInput, Service
from rlhf_ray.serving.wire.bodies import Lenient, Several, checked, plain, read_body, scored, sigmoid

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


def routes(service: Service, limits: LimitSettings, batching: BatchingSettings) -> APIRouter:
    """`/predict` and `/info`."""
    router = APIRouter(tags=["Text Embeddings Inference"])

    @router.post("/predict", summary="Text Embeddings Inference")
    async def predict(request: Request) -> Response:
        """One label, the score."""
        body = await read_body(request, PredictRequest)
        batch = isinstance(body.inputs, list) and bool(body.inputs) and isinstance(body.inputs[0], list)
        groups: Any = body.inputs if batch else [[body.inputs] if isinstance(body.inputs, str) else body.inputs]
        for group in groups:
            if len(group) not in (1, 2):
                raise ApiError(ErrorType.BAD_REQUEST, "inputs: a text or a pair of texts; a batch is a list of lists")
        answer = await service.score([_input("".join(group), body) for group in groups])
        rows = [[{"score": _value(score, body), "label": "LABEL_0"}] for score in answer.scores]
        return scored(rows if batch else rows[0], answer, "raw" if body.raw_scores else "probability", tei=True)

    @router.get("/info", summary="Text Embeddings Inference")
    async def info() -> Response:
        """The model with the largest share, and the limits."""
        model = service.models()[0]
        return plain(
            {
                "model_id": model.name,
                "model_sha": model.version,
                "model_dtype": model.dtype,
                "model_type": {"classifier": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
                "max_concurrent_requests": limits.max_queued_requests,
                "max_input_length": model.max_length,
                "max_batch_tokens": batching.max_tokens,
                "max_batch_requests": batching.max_texts,
                "max_client_batch_size": limits.max_texts,
                "auto_truncate": False,
                "tokenization_workers": 1,
                "version": _VERSION,
                "sha": None,
                "docker_label": None,
            }
        )

    return router


async def rerank(service: Service, value: Any) -> Response:
    """`/rerank` in TEI's form."""
    body = checked(TEIRerankRequest, value)
    if not body.texts:
        raise ApiError(ErrorType.BAD_REQUEST, "texts: at least one")
    answer = await service.score([_input(body.query + text, body) for text in body.texts])
    order = sorted(range(len(body.texts)), key=lambda index: -answer.scores[index].score)
    ranks = [
        {"index": index, "score": _value(answer.scores[index], body)}
        | ({"text": body.texts[index]} if body.return_text else {})
        for index in order
    ]
    return scored(ranks, answer, "raw" if body.raw_scores else "probability", tei=True)


def _input(text: str, body: _Cut) -> ScoreInput:
    keep: Literal["start", "end"] = "start" if body.truncation_direction.lower() == "right" else "end"
    return ScoreInput(text=text, keep=keep, on_too_long="truncate" if body.truncate else "fail")


def _value(score: Score, body: _Cut) -> float:
    return score.score if body.raw_scores else sigmoid(score.score)
