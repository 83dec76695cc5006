"""The wire protocols: one file a family of clients, all in front of the same service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Required

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from rlhf_ray.config.serving import BatchingSettings, LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.context import REQUEST
from rlhf_ray.reward.serve.exchange import Service
from rlhf_ray.reward.serve.occlusion import Tokenizing
from rlhf_ray.reward.serve.wire import chat, explain, own, rollouts, tei, vllm
from rlhf_ray.reward.serve.wire.bodies import plain

_BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/get_reward": (rollouts.OpenRLHFRequest,),
    "/slime": (rollouts.SlimeRequest,),
    "/classify": (vllm.PoolingRequest, vllm.SGLangRequest),
    "/pooling": (vllm.PoolingRequest,),
    "/v1/embeddings": (vllm.PoolingRequest,),
    "/score": (vllm.ScoreRequest,),
    "/v1/score": (vllm.ScoreRequest,),
    "/rerank": (vllm.RerankRequest, tei.TEIRerankRequest),
    "/v1/rerank": (vllm.RerankRequest,),
    "/v2/rerank": (vllm.RerankRequest,),
    "/predict": (tei.PredictRequest,),
    "/v1/chat/completions": (chat.ChatRequest,),
    "/v1/reward": (own.RewardRequest,),
    "/v1/preference": (own.PreferenceRequest,),
    "/v1/explain": (explain.ExplainRequest,),
}
_PATHS = {
    "openrlhf": ("/get_reward",),
    "slime": ("/slime",),
    "vllm": ("/classify", "/pooling", "/v1/embeddings", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    "tei": ("/predict", "/info"),
    "openai": ("/v1/chat/completions", "/v1/models"),
    "own": ("/v1/reward", "/v1/preference"),
    "explain": ("/v1/explain",),
    "operations": ("/health", "/health/ready", "/livez", "/readyz", "/metrics", "/v1/service", "/openapi.json"),
}
_FAMILIES = {path: family for family, paths in _PATHS.items() for path in paths}
_TEI_STATUS = {ErrorType.BAD_REQUEST: 422, ErrorType.OVERLOADED: 429, ErrorType.UNSCORABLE: 424}
_TEI_TYPES = {
    ErrorType.BAD_REQUEST: "Validation",
    ErrorType.TOO_LARGE: "Validation",
    ErrorType.UNSCORABLE: "Tokenizer",
    ErrorType.OVERLOADED: "Overloaded",
    ErrorType.OVER_LIMIT: "Overloaded",
    ErrorType.UNAVAILABLE: "Unhealthy",
}
_ERROR_STATUSES = (400, 401, 404, 413, 422, 424, 429, 500, 503, 504)
_SCORED_HEADERS = {
    "X-Model-Name": "model that scored",
    "X-Model-Version": "version of it",
    "X-Score-Scale": "`raw` or `probability`",
    "X-Tokenize-Time": "milliseconds",
    "X-Queue-Time": "milliseconds",
    "X-Compute-Time": "milliseconds",
    "X-Total-Time": "milliseconds",
    "X-Request-Id": "the request's own, or a new one",
}


class ErrorCause(TypedDict, total=False):
    """Why there are no scores; `param` and `code` for clients that read OpenAI's errors."""

    type: Required[ErrorType]
    message: Required[str]
    index: Required[int | None]
    param: None
    code: int


class ErrorAnswer(TypedDict):
    """An error of every family but TEI's."""

    error: ErrorCause


class TEIErrorAnswer(TypedDict):
    """An error in TEI's words."""

    error: str
    error_type: str


def add_routes(
    app: FastAPI,
    service: Service,
    tokenizing: Tokenizing,
    limits: LimitSettings,
    batching: BatchingSettings,
) -> None:
    """All protocols, their errors, and their description at `/openapi.json`.

    Args:
        tokenizing: for what needs a model's tokenizer.
        limits, batching: what `/info` says, and how much an explanation may ask for.
    """
    for router in (
        rollouts.routes(service),
        vllm.routes(service),
        tei.routes(service, limits, batching),
        chat.routes(service),
        own.routes(service),
        explain.routes(service, tokenizing, limits),
    ):
        app.include_router(router)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return error_response(request.url.path, ApiError(ErrorType.BAD_REQUEST, f"{place}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # Starlette raises it again behind this answer; the outermost layer writes it to the log.
        return error_response(request.url.path, ApiError(ErrorType.INTERNAL, "a fault of the service; see its log"))

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {'is not taken here' if error.status_code == 405 else 'leads nowhere'}"
        response = error_response(request.url.path, ApiError(ErrorType.NOT_FOUND, message), error.status_code)
        response.headers.update(error.headers or {})
        return response

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def family_now(path: str) -> str:
    """The family of the request under way; a route that belongs to several has said which it is."""
    context = REQUEST.get(None)
    return family_of(path) if context is None else context.family


def family_of(path: str) -> str:
    """Which clients a path belongs to, for the metrics."""
    return _FAMILIES.get(path, "page" if path == "/" or path.startswith("/page/") else "other")


def error_response(path: str, error: ApiError, status: int | None = None) -> Response:
    """An error in the words of the clients of a path.

    Args:
        status: in place of the error's own.
    """
    context = REQUEST.get(None)
    if context is not None:
        context.error = error.type
    status, family = status or error.status, family_now(path)
    content: dict[str, Any] = {"error": {"type": error.type.value, "message": error.message, "index": error.index}}
    if family == "tei":
        status = _TEI_STATUS.get(error.type, status)
        content = {"error": error.message, "error_type": _TEI_TYPES.get(error.type, "Backend")}
    elif family in ("vllm", "sglang", "openai"):
        # There a text that is too long is a bad request, as everything else about a single text.
        status = 400 if error.index is not None and status in (413, 422) else status
        content["error"] |= {"param": None, "code": status}
    headers: Mapping[str, str] | None = None
    if error.retry_after_s is not None:
        headers = {"Retry-After": str(error.retry_after_s)}
    return plain(content, status, headers)


def _description(app: FastAPI) -> dict[str, Any]:
    """OpenAPI with the bodies, which are read by the routes themselves, and with errors and headers, which every route
    has."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = sorted({model for bodies in _BODIES.values() for model in bodies}, key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    error_schema = TypeAdapter(ErrorAnswer | TEIErrorAnswer).json_schema(ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= definitions["$defs"] | error_schema.pop("$defs")
    error = {
        "description": "see the documentation's table of errors",
        "content": {"application/json": {"schema": error_schema}},
    }
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _SCORED_HEADERS.items()}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] |= {str(status): error for status in _ERROR_STATUSES}
        if path in _BODIES:
            if family_of(path) != "explain":
                operations["post"]["responses"]["200"]["headers"] = headers
            bodies = [references[(model, "validation")] for model in _BODIES[path]]
            body = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
            operations["post"]["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return document
