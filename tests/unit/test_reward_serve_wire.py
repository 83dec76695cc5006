"""Every family's words for the same scores. Real clients where they exist; the service behind is a stub that scores a
text by its characters, so that a mix-up of texts shows."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from rlhf_ray.config.serving import BatchingSettings, CallerSettings, CandidateSettings, LimitSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.auth import Callers
from rlhf_ray.reward.serve.exchange import Answer, ModelInfo, Score, ScoreInput, Timings
from rlhf_ray.reward.serve.front import Front, Fronted
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.wire import add_routes

TOKEN = "a-token-of-24-characters"
MODEL = ModelInfo("rm", "v7", 2.0, ("preference",), 1, 32, "float32", "live", 1.0)
RATED = ModelInfo("rm", "v7", 2.0, ("helpfulness", "kindness"), 3, 32, "float32", "live", 1.0)


def score_of(text: str) -> float:
    return round(sum(ord(letter) * (place + 1) for place, letter in enumerate(text)) % 1999 / 300 - 3, 3)


class StubService:
    """Scores by a formula; raises what it is told to."""

    def __init__(self, info: ModelInfo = MODEL, error: ApiError | None = None) -> None:
        self.info, self.error = info, error
        self.calls: list[tuple[tuple[ScoreInput, ...], str | None, str | None]] = []

    async def score(
        self, inputs: Sequence[ScoreInput], *, model: str | None = None, sticky: str | None = None
    ) -> Answer:
        self.calls.append((tuple(inputs), model, sticky))
        if self.error is not None:
            raise self.error
        return Answer(tuple(self._score(each) for each in inputs), self.info, Timings(0.001, 0.002, 0.003))

    def _score(self, each: ScoreInput) -> Score:
        text = each.text
        if text is None and each.messages is not None:
            text = "".join(message["content"] for message in each.messages)
        if text is None:
            text = "".join(chr(token) for token in each.token_ids or ())
        value = score_of(text)
        attributes = {name: value + place for place, name in enumerate(self.info.attributes)}
        return Score(value, attributes, 0.25, len(text), False)

    def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    def detokenize(self, token_ids: Sequence[int], model: str | None = None) -> str:
        return "".join(map(chr, token_ids))


def application(service: StubService, token: str | None = None) -> Fronted:
    app = FastAPI()
    add_routes(app, service, no_tokenizer, LimitSettings(), BatchingSettings())
    callers = Callers(lambda: {"one": CallerSettings(tokens=(token,))} if token else {})
    return Fronted(app, Front(Observer(CandidateSettings(), False), callers, LimitSettings(max_body_bytes=200_000)))


async def no_tokenizer(work: Any, model: str | None = None) -> Any:
    raise ApiError(ErrorType.NOT_FOUND, "no such model")


def client(service: StubService | None = None, token: str | None = None) -> TestClient:
    return TestClient(application(service or StubService(), token), "http://localhost", raise_server_exceptions=False)


def post(path: str, body: Any, service: StubService | None = None) -> httpx.Response:
    """An answer, which the description must have field by field."""
    response: httpx.Response = client(service).post(path, json=body)
    described = description()["paths"][path.partition("?")[0]]["post"]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), {**schema, "components": description()["components"]})
    if "x-model-name" in response.headers:  # something was scored
        assert {name.lower() for name in described["headers"]} <= response.headers.keys()
    return response


@cache
def description() -> dict[str, Any]:
    """The OpenAPI document; an object has no other fields than those that it names."""

    def close(schema: Any) -> None:
        if isinstance(schema, dict):
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
            for each in schema.values():
                close(each)
        elif isinstance(schema, list):
            for each in schema:
                close(each)

    document: dict[str, Any] = client().get("/openapi.json").json()
    close(document["components"]["schemas"])
    return document


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def raw(path: str, body: Any) -> list[float]:
    """The raw scores of an answer, read as the family's client reads them."""
    answer = post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Score-Scale"] == "raw"
    assert (answer.headers["X-Model-Name"], answer.headers["X-Model-Version"]) == ("rm", "v7")
    assert float(answer.headers["X-Queue-Time"]) == 2.0
    content = answer.json()
    if path == "/get_reward":
        assert content["rewards"] == content["scores"]
        return content["rewards"]
    if path == "/slime":
        return [content["score"]]
    if path == "/v1/chat/completions":
        return [choice["logprobs"]["content"][0]["logprob"] for choice in content["choices"]]
    if path == "/v1/reward":
        return [item["score"] for item in content["items"]]
    if path == "/predict":
        return [row[0]["score"] for row in content] if isinstance(content[0], list) else [content[0]["score"]]
    if isinstance(content, list):
        return [item["embedding"][0] for item in content]
    key = {"classify": "probs", "pooling": "data", "embeddings": "embedding"}[path.rpartition("/")[2]]
    return [item[key][-1] for item in content["data"]]


A, B = "What? It is good.", "What? Bad!"
TURNS = [{"role": "user", "content": "What? "}, {"role": "assistant", "content": "It is good."}]


@pytest.mark.parametrize(
    ("path", "body", "texts"),
    [
        ("/get_reward", {"query": [A, B], "prompts": ["What? "] * 2, "labels": [None, 3]}, [A, B]),
        ("/slime", {"prompt": "What? ", "response": "It is good.", "label": "x"}, [A]),
        ("/slime", {"prompt": TURNS[:1], "response": "It is good."}, [A]),
        ("/classify", {"model": "any", "input": A, "use_activation": False}, [A]),
        ("/classify", {"input": [A, B], "use_activation": False}, [A, B]),
        ("/classify", {"input": [ord(letter) for letter in A], "use_activation": False}, [A]),
        ("/classify", {"messages": TURNS, "use_activation": False}, [A]),
        ("/classify", {"text": [A, B], "model": "any"}, [A, B]),
        ("/pooling", {"input": [[ord(x) for x in A], [ord(x) for x in B]], "use_activation": False}, [A, B]),
        ("/v1/embeddings", {"model": "any", "input": A}, [A]),
        ("/predict", {"inputs": A, "raw_scores": True}, [A]),
        ("/predict", {"inputs": ["What? ", "It is good."], "raw_scores": True}, [A]),
        ("/predict", {"inputs": [[A], [B]], "raw_scores": True}, [A, B]),
        ("/v1/chat/completions", {"model": "any", "messages": TURNS}, [A]),
        (
            "/v1/reward",
            {"items": [{"text": A}, {"prompt": "What? ", "response": "Bad!"}, {"messages": TURNS}]},
            [A, B, A],
        ),
        ("/v1/reward", {"items": [{"token_ids": [ord(letter) for letter in A]}]}, [A]),
    ],
)
def test_every_family_gets_the_same_raw_scores(path, body, texts):
    assert raw(path, body) == [score_of(text) for text in texts]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"input": A}),
        ("/pooling", {"input": A}),
        ("/score", {"queries": "What? ", "documents": "It is good."}),
        ("/rerank", {"query": "What? ", "documents": ["It is good."]}),
        ("/rerank", {"query": "What? ", "texts": ["It is good."]}),
        ("/predict", {"inputs": A}),
    ],
)
def test_the_activation_is_on_where_it_is_on_in_the_original(path, body):
    answer = post(path, body)
    assert answer.headers["X-Score-Scale"] == "probability"
    assert str(sigmoid(score_of(A)))[:8] in answer.text


def test_openrlhf_sends_empty_lists_to_servers_it_does_not_need():
    assert post("/get_reward", {"query": [], "prompts": [], "labels": []}).json() == {
        "rewards": [], "scores": [], "extra_logs": {},
    }  # fmt: skip


def test_openrlhf_logs_numbers_only():
    logs = post("/get_reward", {"query": [A, B]}, StubService(RATED)).json()["extra_logs"]
    assert {len(values) for values in logs.values()} == {2}
    assert all(isinstance(value, float) for values in logs.values() for value in values)
    assert {"disagreement", "kindness", "num_tokens", "truncated"} <= logs.keys()


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"queries": "q", "documents": ["a", "b"]}, ["qa", "qb"]),
        ({"queries": ["q", "p"], "items": ["a", "b"]}, ["qa", "pb"]),
        ({"data_1": "q", "data_2": "a"}, ["qa"]),
        ({"text_1": ["q"], "text_2": ["a", "b", "c"]}, ["qa", "qb", "qc"]),
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_of_vllms_score(path, body, texts):
    content = post(path, {**body, "use_activation": False}).json()
    assert [item["score"] for item in content["data"]] == [score_of(text) for text in texts]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_sorts_and_keeps_the_index(path):
    documents = ["a", "long one", "c"]
    results = post(path, {"query": "q", "documents": documents, "use_activation": False, "top_n": 2}).json()["results"]
    best = sorted(range(3), key=lambda index: -score_of("q" + documents[index]))[:2]
    assert [result["index"] for result in results] == best
    assert [result["document"]["text"] for result in results] == [documents[index] for index in best]


def test_teis_rerank_has_its_own_form():
    ranks = post("/rerank", {"query": "q", "texts": ["a", "b"], "raw_scores": True, "return_text": True}).json()
    assert sorted(rank["index"] for rank in ranks) == [0, 1]
    assert [rank["score"] for rank in ranks] == sorted((score_of("qa"), score_of("qb")), reverse=True)
    assert all(rank["text"] == "ab"[rank["index"]] for rank in ranks)


def test_vllm_says_what_becomes_of_a_long_text():
    service = StubService()
    for extra in ({}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 9, "truncation_side": "left"}):
        post("/classify", {"input": A, **extra}, service)
    given = [(each.on_too_long, each.max_tokens, each.keep) for (each,), _, _ in service.calls]
    assert given == [("fail", None, "start"), ("truncate", None, "start"), ("truncate", 9, "end")]


@pytest.mark.parametrize(("path", "status"), [("/classify", 400), ("/predict", 413), ("/v1/reward", 413)])
def test_a_text_that_is_too_long_is_refused_as_in_the_original(path, status):
    error = ApiError(ErrorType.TOO_LARGE, "text 0 is longer than 32 tokens", index=0)
    assert post(path, BODIES[path], StubService(error=error)).status_code == status


def test_slime_without_a_key_takes_the_whole_answer():
    answer = post("/slime?format=number", {"prompt": "What? ", "response": "It is good."})
    assert answer.json() == score_of(A)


def test_verls_older_word_for_the_activation_is_understood():
    content = post("/classify", {"input": A, "activation": False}).json()
    assert content["data"][-1]["probs"][-1] == score_of(A)


@pytest.mark.parametrize("path", ["/get_reward", "/classify", "/v1/reward", "/predict"])
def test_a_score_that_is_no_number_is_never_answered(path):
    class Broken(StubService):
        def _score(self, each: ScoreInput) -> Score:
            return Score(math.nan, {"preference": math.nan}, 0.0, 1, False)

    assert post(path, BODIES[path], Broken()).status_code == (
        424 if path == "/predict" else 400 if path == "/classify" else 422
    )


def test_content_in_parts_is_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "What? "}]}, TURNS[1]]
    assert raw("/v1/chat/completions", {"messages": parts}) == [score_of(A)]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TURNS[1]]
    assert post("/v1/chat/completions", {"messages": image}).status_code == 400


def test_a_preference_names_the_item_and_not_the_text():
    error = ApiError(ErrorType.TOO_LARGE, "too long", index=5)
    body = {"items": [{"prompt": "q", "response_a": "a", "response_b": "b"}] * 3}
    assert post("/v1/preference", body, StubService(error=error)).json()["error"]["index"] == 2


def test_a_probability_of_two_responses_is_calibrated():
    body = {"items": [{"prompt": "q", "response_a": "a", "response_b": "b"}]}
    content = post("/v1/preference", body).json()
    assert content["items"][0]["probability"] == pytest.approx(sigmoid((score_of("qa") - score_of("qb")) / 2.0))
    assert content["model"] == {"name": "rm", "version": "v7", "temperature": 2.0, "attributes": ["preference"]}


def test_the_responses_to_a_prompt_stay_with_one_model():
    service = StubService()
    for response in ("a", "b"):
        post("/slime", {"prompt": "q", "response": response}, service)
        post("/get_reward", {"query": ["q" + response], "prompts": ["q"]}, service)
        post("/score", {"queries": "q", "documents": response}, service)
        post("/rerank", {"query": "q", "documents": [response]}, service)
        post("/rerank", {"query": "q", "texts": [response]}, service)
    assert len({sticky for _, _, sticky in service.calls}) == 1
    turn = {"role": "user", "content": "q"}
    chats = StubService()
    for response in ("a", "b"):
        messages = [turn, {"role": "assistant", "content": response}]
        for path in ("/classify", "/pooling", "/v1/embeddings"):
            post(path, {"messages": messages, "model": "rm"}, chats)
    [sticky] = {sticky for _, _, sticky in chats.calls}
    assert sticky is not None


def test_the_openai_package_reads_the_reward():
    async def ask(info: ModelInfo) -> Any:
        transport = httpx.ASGITransport(application(StubService(info), TOKEN))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport) as http:
            service = openai.AsyncOpenAI(base_url="http://service/v1", api_key=TOKEN, http_client=http)
            models = await service.models.list()
            return models.data[0].id, await service.chat.completions.create(model="rm", messages=TURNS)

    name, one = asyncio.run(ask(MODEL))
    assert name == "rm"
    assert one.choices[0].message.content == f"reward:{score_of(A)!r}"
    _, rated = asyncio.run(ask(RATED))
    parts = dict(part.split(":") for part in rated.choices[0].message.content.split(","))
    assert {name: float(value) for name, value in parts.items()} == {
        "helpfulness": score_of(A), "kindness": score_of(A) + 1,
    }  # fmt: skip
    assert [(each.token, each.logprob) for each in rated.choices[0].logprobs.content] == [
        ("helpfulness", score_of(A)), ("kindness", score_of(A) + 1),
    ]  # fmt: skip


OVERLOADED = ApiError(ErrorType.OVERLOADED, "too many", retry_after_s=3)
BODIES = {
    "/get_reward": {"query": [A]},
    "/slime": {"prompt": "q", "response": "a"},
    "/classify": {"input": A},
    "/predict": {"inputs": A},
    "/v1/chat/completions": {"messages": TURNS},
    "/v1/reward": {"items": [{"text": A}]},
    "/rerank": {"query": "q", "documents": ["a"]},
}


@pytest.mark.parametrize(("path", "body"), BODIES.items())
def test_overload_is_503_but_for_tei(path, body):
    answer = post(path, body, StubService(error=OVERLOADED))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429 if path == "/predict" else 503, "3")


@pytest.mark.parametrize(("path", "body"), BODIES.items())
def test_a_callers_own_limit_is_429_in_the_form_of_overload(path, body):
    answer = post(path, body, StubService(error=ApiError(ErrorType.OVER_LIMIT, "too many", retry_after_s=3)))
    overload = post(path, body, StubService(error=OVERLOADED))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
    expected = overload.json()
    if path != "/predict":
        expected["error"] |= {"type": "over_limit"} | ({"code": 429} if "code" in expected["error"] else {})
    assert answer.json() == expected


def test_a_path_of_two_families_answers_each_in_its_words():
    service = StubService(error=OVERLOADED)
    tei = post("/rerank", {"query": "q", "texts": ["a"]}, service)
    assert (tei.status_code, tei.json()) == (429, {"error": "too many", "error_type": "Overloaded"})
    vllm = post("/rerank", {"query": "q", "documents": ["a"]}, service)
    assert vllm.json()["error"] | {"index": None} == {
        "type": "overloaded", "message": "too many", "param": None, "code": 503, "index": None,
    }  # fmt: skip


BAD_BODIES = [
    b"", b"nonsense", b"null", b"[]", b"3", b'"text"', b"{", b'{"query": NaN}', b'{"query": [1e400]}', b"\xff\xfe{}",
    b'{"query": [' + b"9" * 5000 + b"]}", b"[" * 100_000, b'{"a":' * 30_000, '{"query": "é"}'.encode("latin-1"),
    '{"input": 3, "inputs": 3, "items": 3, "messages": 3, "query": 3, "prompt": 3}'.encode("utf-16"),
]  # fmt: skip


@pytest.mark.parametrize("path", [*BODIES, "/pooling", "/v1/embeddings", "/score", "/v1/preference", "/v1/explain"])
@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_bad_body_is_a_typed_error(path, body):
    answer = client().post(path, content=body)
    assert answer.status_code == (422 if path == "/predict" else 400), answer.text
    error = answer.json()["error"]
    assert error if path == "/predict" else error["type"] == "bad_request"
    assert "Traceback" not in answer.text


def test_the_first_wrong_entry_refuses_a_list():
    """One error for each of a hundred thousand entries would hold up everybody for seconds."""
    bodies = [
        value
        for name in ("chat", "own", "rollouts", "tei", "vllm")
        for value in vars(importlib.import_module(f"rlhf_ray.reward.serve.wire.{name}")).values()
        if isinstance(value, type) and issubclass(value, BaseModel)
    ]
    counts = {}
    for body in bodies:
        try:
            body.model_validate(dict.fromkeys(body.model_fields, [[]] * 1000))
        except ValidationError as error:
            counts[body.__name__] = error.error_count()
    assert len(counts) > 15
    assert max(counts.values()) < 40, counts


def test_an_error_never_holds_the_text():
    secret = "a text that nobody may read"
    for path, body in (
        ("/get_reward", {"query": secret}),
        ("/classify", {"input": {"text": secret}}),
        ("/v1/reward", {"items": [{"text": secret, "more": secret}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [secret]}]}),
    ):
        answer = post(path, body)
        assert answer.status_code == 400
        assert "nobody" not in answer.text


def test_a_fault_of_the_service_is_typed_and_tells_nothing():
    class Broken(StubService):
        async def score(self, *arguments: Any, **options: Any) -> Answer:
            raise RuntimeError("a secret of the service")

    answer = client(Broken()).post("/get_reward", json={"query": [A]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "internal")
    assert "secret" not in answer.text


def test_no_route_answers_without_the_token():
    guarded = client(token=TOKEN)
    paths = client().get("/openapi.json").json()["paths"]
    assert len(paths) > 15
    unlisted = ("/", "/page/page.js", "/metrics", "/v1/service", "/openapi.json", "/nowhere", "/-/else")
    near_health = ("/health/", "//health", "/Health", "/health/ready/", "/health%2f..%2fmetrics", "/health/../metrics")
    near_probes = ("/livez/", "//livez", "/readyz/metrics", "/Readyz", "/readyz%2f..%2fmetrics", "/readyz/../metrics")
    for path in [*paths, *unlisted, *near_health, *near_probes]:
        for method in ("GET", "POST", "OPTIONS"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                assert guarded.request(method, path, headers=headers).status_code == 401, (method, path)
    assert guarded.post("/get_reward", json={"query": [A]}, auth=("x", TOKEN)).status_code == 200


def test_a_body_that_is_too_large_is_not_read():
    answer = client().post("/get_reward", content=json.dumps({"query": ["x" * 300_000]}))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")

    def chunks() -> Any:
        yield from (b"x" * 50_000 for _ in range(10))

    assert client().post("/get_reward", content=chunks()).status_code == 413


def test_the_description_names_every_body_and_error():
    document = client().get("/openapi.json").json()
    for path in BODIES:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert {"200", "400", "401", "413", "422", "503"} <= operation["responses"].keys()
    assert (
        len(document["paths"]["/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"])
        == 2
    )
