"""What the engine admits, what it refuses, and what it tells of it. The model behind is a stub that adds up token ids;
tokenizer and limits are those of the tiny reward model."""

from __future__ import annotations

import asyncio
import functools
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray.serve._private import tracing_utils
from ray.serve.schema import TracingConfig

from rlhf_ray.config.serving import (
    BatchingSettings,
    CallerSettings,
    CandidateSettings,
    LimitSettings,
    ServedModelSettings,
    ServedScorerSettings,
)
from rlhf_ray.data.presets import prepare
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.serve.audit import AuditRecord
from rlhf_ray.reward.serve.auth import Callers
from rlhf_ray.reward.serve.batcher import MicroBatcher, ScoredBatch
from rlhf_ray.reward.serve.context import REQUEST, Caller, RequestContext
from rlhf_ray.reward.serve.engine import RewardEngine
from rlhf_ray.reward.serve.exchange import ScoreInput
from rlhf_ray.reward.serve.front import Front, Fronted
from rlhf_ray.reward.serve.model_table import ModelTable, Weights
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.probes import probe_routes
from rlhf_ray.reward.serve.traces import record_parts
from rlhf_ray.reward.serve.wire import add_routes

TOKEN = "a-token-of-24-characters"


class StubProcess:
    """Stands in for the scoring process."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.loaded: list[str] = []
        self.broken: set[str] = set()
        self.lost = False
        self.forward_passes = 0

    async def load(self, weights: Weights) -> None:
        if weights.key not in self.loaded:
            self.loaded.append(weights.key)

    async def keep_only(self, keys: Sequence[str]) -> None:
        self.loaded = [key for key in self.loaded if key in keys]

    def check(self, keys: Iterable[str]) -> None:
        if self.lost or not set(keys) & set(self.loaded):
            raise ApiError(ErrorType.UNAVAILABLE, "the model is lost")

    async def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
        self.forward_passes += 1
        await self.open.wait()
        sums = np.array([float(sum(token_ids)) for token_ids, _ in texts])
        if any(name in key for name in self.broken):
            sums[:] = np.nan
        failures = tuple("" if np.isfinite(value) else "not a number" for value in sums)
        lengths = np.array([len(token_ids) for token_ids, _ in texts])
        cut = np.array([was_cut for _, was_cut in texts])
        scored = ScoredTexts(sums[:, None, None], sums, np.zeros(len(sums)), failures, lengths, cut, key)
        return ScoredBatch(scored, 0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    prepare("tiny", folder, lambda line: None)
    return folder / "tiny" / "reward_model"


Test = Callable[[RewardEngine, StubProcess, Observer], Awaitable[None]]


def run(
    tiny: Path, test: Test, *, models: Sequence[ServedModelSettings] | None = None, scorer: Any = None, **limits: Any
) -> None:
    async def main() -> None:
        process, observer = StubProcess(), Observer(CandidateSettings(), False)
        batcher = MicroBatcher(
            BatchingSettings(wait_ms=0), lambda model, texts: process.score(model.key, texts), observer.batch
        )
        settings = ServedScorerSettings.model_validate({"max_length": 16, **(scorer or {})})
        engine = RewardEngine(settings, LimitSettings.model_validate(limits), cast(Any, process), batcher, observer)
        await engine.load(models or [ServedModelSettings(name="main", path=str(tiny))])
        held = REQUEST.set(RequestContext("request", "own"))
        try:
            await asyncio.wait_for(test(engine, process, observer), 20)
        finally:
            REQUEST.reset(held)
            await batcher.close()

    asyncio.run(main())


async def refused(call: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value


def texts(*values: str, **options: Any) -> list[ScoreInput]:
    return [ScoreInput(text=value, **options) for value in values]


LONG = "word " * 60


def test_limits_are_refused_with_their_type(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        assert (await refused(engine.score(texts("a", "b", "c", "d")))).type is ErrorType.TOO_LARGE
        assert (await refused(engine.score(texts(LONG, LONG)))).type is ErrorType.TOO_LARGE
        assert len((await engine.score(texts("a", "b", "c"))).scores) == 3

    run(tiny, test, max_texts=3, max_tokens=31)


def test_a_caller_has_so_many_texts_under_way_and_is_named_in_the_audit(tiny):
    audited: list[AuditRecord] = []

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        observer.audit = audited.extend
        caller = Caller("one", max_texts=4)

        async def ask(*values: str) -> int:
            REQUEST.set(RequestContext("request", "own", caller))
            with caller.holding(1, 1):  # as `Front` does
                return len((await engine.score(texts(*values))).scores)

        def asked(*values: str) -> asyncio.Task[int]:
            return asyncio.create_task(ask(*values))

        error = await refused(asked("a", "b", "c", "d", "e"))
        assert (error.type, error.message) == (ErrorType.TOO_LARGE, "5 texts in one request; at most 4 are taken")
        process.open.clear()
        waiting = asked("a", "b", "c")
        await asyncio.sleep(0)
        error = await refused(asked("d", "e"))
        assert (error.type, error.retry_after_s) == (ErrorType.OVER_LIMIT, 9)
        others = asyncio.create_task(engine.score(texts("f", "g")))
        last = asked("h")
        process.open.set()
        assert (await waiting, await last, len((await others).scores)) == (3, 1, 2)
        assert await asked("a", "b", "c", "d") == 4
        assert caller.texts == 0
        assert observer.metrics.counters["caller_texts"].labels("one")._value.get() == 8
        assert sorted(str(record.caller) for record in audited) == ["None"] * 2 + ["one"] * 8

    run(tiny, test, retry_after_s=9)


def test_a_long_text_is_cut_and_said_or_refused(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        score = (await engine.score(texts(LONG))).scores[0]
        assert (score.num_tokens, score.truncated) == (16, True)
        error = await refused(engine.score(texts("short", LONG, on_too_long="fail")))
        assert (error.type, error.index) == (ErrorType.TOO_LARGE, 1)
        fewer = (await engine.score(texts(LONG, max_tokens=5))).scores[0]
        assert (fewer.num_tokens, fewer.truncated) == (5, True)
        # Not quietly cut to the model's 16: whoever asks for more believes to talk to another model.
        more = await refused(engine.score(texts("short", "short", max_tokens=17)))
        assert (more.type, more.index) == (ErrorType.BAD_REQUEST, 0)

    run(tiny, test)


def test_which_end_is_kept(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        ids = tuple(range(4, 30))
        end, start = [
            (await engine.score([ScoreInput(token_ids=ids, keep=keep)])).scores[0].score for keep in ("end", "start")
        ]
        assert (end, start) == (sum(ids[-16:]), sum(ids[:16]))

    run(tiny, test)


@pytest.mark.parametrize(
    "given",
    [
        ScoreInput(token_ids=(1, 10**9)),
        ScoreInput(token_ids=(-1,)),
        ScoreInput(text="\ud800"),
        ScoreInput(messages=({"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "a"})),
    ],
)
def test_what_no_tokenizer_takes_is_a_bad_request(tiny, given):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        error = await refused(engine.score([given]))
        assert (error.type, error.index) == (ErrorType.BAD_REQUEST, 0)

    run(tiny, test)


def test_one_turn_for_a_model_without_a_chat_template_is_prompt_and_response(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    turn = ({"role": "user", "content": "Was it"}, {"role": "assistant", "content": " good?"})

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        as_chat, as_text = (await engine.score([ScoreInput(messages=turn), *texts("Was it good?")])).scores
        assert as_chat == as_text
        error = await refused(engine.score([ScoreInput(messages=({"role": "system", "content": "S"}, *turn))]))
        assert (error.type, error.index) == (ErrorType.BAD_REQUEST, 0)

    run(folder, test)


def test_the_queue_has_a_deadline(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        process.open.clear()
        REQUEST.set(RequestContext("late", "own"))
        waiting = [asyncio.ensure_future(engine.score(texts("a"))) for _ in range(2)]
        for each in waiting:
            assert (await refused(each)).type is ErrorType.DEADLINE
        assert engine.queued_requests == 0

    run(tiny, test, deadline_s=0.2)


def test_a_long_text_is_tokenized_beside_the_event_loop(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        short = (await engine.score(texts("word " * 20))).scores[0].score
        # Of a text of words little is tokenised, of a single long word all of it.
        assert (await engine.score(texts("word " * 400_000))).scores[0].score == short
        waiting = asyncio.ensure_future(engine.score(texts("word" * 400_000)))
        pauses, last = [], time.perf_counter()
        while not waiting.done():
            await asyncio.sleep(0.002)
            pauses.append(time.perf_counter() - last)
            last = time.perf_counter()
        assert len(pauses) > 20
        assert max(pauses) < sum(pauses) / 3
        assert waiting.result().scores[0].truncated

    run(tiny, test)


def test_a_text_that_waits_for_the_tokenizer_has_a_deadline_too(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        free = threading.Event()
        busy = engine._tokenizing.submit(free.wait)
        try:
            assert (await refused(engine.tokenizing(len))).type is ErrorType.DEADLINE
        finally:
            free.set()
        assert busy.result()

    run(tiny, test, deadline_s=0.2)


def test_probes_that_wait_for_one_another_keep_their_time(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        process.open.clear()
        probes = [asyncio.ensure_future(refused(engine.probe(0.4))) for _ in range(8)]
        errors = await asyncio.wait_for(asyncio.gather(*probes), 8 * 0.4 / 2)
        assert {error.type for error in errors} == {ErrorType.UNAVAILABLE}

    run(tiny, test)


def test_a_model_that_has_just_scored_needs_no_probe(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        await engine.score(texts("a"))
        process.open.clear()
        waiting = asyncio.ensure_future(engine.score(texts("b")))
        await asyncio.wait_for(engine.probe(5), 0.5)
        engine._scored_at.clear()
        assert (await refused(engine.probe(0.1))).type is ErrorType.UNAVAILABLE
        process.open.set()
        await waiting
        await engine.probe(5)

    run(tiny, test)


def test_probes_tell_whether_texts_are_scored_and_score_none(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        limits = LimitSettings(max_queued_requests=2)
        app = FastAPI()
        add_routes(app, engine, engine.tokenizing, limits, BatchingSettings())
        app.include_router(probe_routes(engine.check_ready))
        callers = Callers(lambda: {"default": CallerSettings(tokens=(TOKEN,))})
        transport = httpx.ASGITransport(Fronted(app, Front(observer, callers, limits)))
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=5) as client:

            async def readiness() -> tuple[int, str | None]:
                # A replica that is not ready is alive all the same, and no probe needs the token.
                assert (await client.get("/livez")).json() == {"status": "ok"}
                answer = await client.get("/readyz")
                return answer.status_code, answer.json().get("error", {}).get("message")

            process.open.clear()
            before = process.forward_passes
            assert await readiness() == (200, None)
            assert process.forward_passes == before
            post = functools.partial(client.post, "/get_reward", json={"query": ["a"]}, auth=("x", TOKEN))
            waiting = [asyncio.ensure_future(post()) for _ in range(2)]
            while engine.queued_requests < 2:
                await asyncio.sleep(0)
            assert (await post()).status_code == 503
            assert await readiness() == (200, None), "a full queue passes"
            process.lost = True
            assert await readiness() == (503, "the model is lost")
            process.lost = False
            await engine._batcher.close()
            assert await readiness() == (503, "the replica is stopping")
            assert [each.status_code for each in await asyncio.gather(*waiting)] == [503, 503]
            engine._table = ModelTable(())
            assert await readiness() == (503, "no model is loaded yet")
            assert (await client.get("/v1/models")).status_code == 401

    run(tiny, test)


def test_a_score_that_is_no_number_is_an_error_and_counted(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        process.broken.add("reward_model")
        error = await refused(engine.score(texts("a", "b")))
        assert (error.type, error.index) == (ErrorType.UNSCORABLE, 0)
        assert (await refused(engine.probe(5))).type is ErrorType.UNAVAILABLE
        [work] = observer.take().work.values()
        assert (work.texts, work.failures) == (2, 2)
        assert b"rlhf_ray_failed_texts_total" in observer.exposition(True, 0, 0), "nothing to take quantiles of"
        [labels] = {model.id for model in engine.models()}
        assert observer.metrics.counters["failed_texts"].labels(*labels)._value.get() == 2

    run(tiny, test)


@pytest.mark.parametrize("fault", [ErrorType.UNSCORABLE, ErrorType.INTERNAL, ErrorType.UNAVAILABLE])
def test_what_a_model_fails_at_counts_against_it(tiny, fault, monkeypatch):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        async def score(*_: Any) -> Any:
            raise ApiError(fault, "the model does not survive it", index=1)

        monkeypatch.setattr(engine._batcher, "score", score)
        assert (await refused(engine.score(texts("a", "b")))).type is fault
        failures = [work.failures for work in observer.take().work.values()]
        # Of a replica that stops, or has lost its process, no model is to blame.
        assert failures == ([] if fault is ErrorType.UNAVAILABLE else [2])

    run(tiny, test)


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        (TypeError("in a chat template"), 2),
        (ApiError(ErrorType.UNSCORABLE, "the model does not survive it"), 2),
        (ApiError(ErrorType.UNAVAILABLE, "its process is gone"), 0),
    ],
    ids=["any", "its own", "not its own"],
)
def test_a_shadow_that_fails_gives_its_place_up(tiny, monkeypatch, fault, failures):
    models = [
        ServedModelSettings(name="main", path=str(tiny)),
        ServedModelSettings(name="next", path=str(tiny), shadow=True),
    ]

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        async def fail(*_: Any) -> Any:
            raise fault

        monkeypatch.setattr(engine._batcher, "score_as_shadow", fail)
        await engine.score(texts("a", "b"))
        while observer._waiting_for_shadow:
            await asyncio.sleep(0.01)
        shadow, work = engine.models()[1].id, observer.take().work
        assert (work[shadow].failures if shadow in work else 0) == failures
        assert observer.metrics.counters["shadow_skipped_texts"].labels(*shadow)._value.get() == 2 - failures

    run(tiny, test, models=models)


@pytest.mark.parametrize(("family", "found"), [("own", False), ("explain", False), ("vllm", True), ("openai", True)])
def test_a_name_that_nobody_knows_is_no_name_but_for_our_own_clients(tiny, family, found):
    """Others must send some name, and a canary beside the model changes nothing for them."""
    models = [ServedModelSettings(name=name, path=str(tiny), share=0.5) for name in ("main", "canary")]

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        REQUEST.set(RequestContext("request", family))
        if found:
            assert (await engine.score(texts("a"), model="gpt")).model.name in ("main", "canary")
        else:
            assert (await refused(engine.score(texts("a"), model="gpt"))).type is ErrorType.NOT_FOUND
        assert (await engine.score(texts("a"), model="canary")).model.name == "canary"

    run(tiny, test, models=models)


def test_the_client_of_a_model_that_was_exchanged_meanwhile_is_told(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        assert (await refused(engine.score(texts("a"), model="before"))).type is ErrorType.NOT_FOUND

    run(tiny, test)


def test_models_that_are_gone_are_in_the_metrics_no_more(tiny, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny, folder)

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        await engine.score(texts("a"))
        assert b'rlhf_ray_score{model="main"' in observer.exposition(True, 0, 0)
        await engine.load([ServedModelSettings(name="other", path=str(folder))])
        await engine.score(texts("a"))
        shown = observer.exposition(True, 0, 0)
        assert b'rlhf_ray_score{model="other"' in shown
        assert b'rlhf_ray_score{model="main"' not in shown
        assert b'rlhf_ray_disagreement_mean{model="main"' not in shown

    run(tiny, test)


def test_a_model_that_does_not_score_does_not_replace_one_that_does(tiny, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(tiny)

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        before = engine.models()
        process.broken.add("/other@")
        with pytest.raises(Exception, match="cannot score a plain sentence"):
            await engine.load([ServedModelSettings(name="main", path=str(other))])
        assert engine.models() == before
        process.broken.clear()
        await engine.load([ServedModelSettings(name="main", path=str(other))])
        assert [key.partition("@")[0] for key in process.loaded] == [str(other)]

    run(tiny, test)


SPANS = InMemorySpanExporter()
PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_in_memory() -> list[SimpleSpanProcessor]:
    """Serve's exporter here, as `otlp_exporter` is with a collector."""
    return [SimpleSpanProcessor(SPANS)]


def test_a_traced_request_has_its_parts_below_serves_span_below_the_clients(tiny, monkeypatch):
    monkeypatch.setattr(tracing_utils, "_tracing_enabled", False)
    path = f"{__name__}:{spans_in_memory.__name__}"
    tracing_utils.setup_tracing("replica", "id", tracing_config=TracingConfig(enabled=True, exporter_import_path=path))

    async def traced(engine: RewardEngine, kept: bool) -> list[ReadableSpan]:
        SPANS.clear()
        # What Serve does with the header of a request; a context of its own, as each request has one.
        header = {"traceparent": f"00-{'-'.join(PARENT)}-0{kept:d}"}
        with tracing_utils.TraceContextManager(
            "request", trace_context=tracing_utils.extract_propagated_context(header)
        ):
            await engine.score(texts("a secret text", "b"))
        return list(SPANS.get_finished_spans())

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        assert [span.name for span in await asyncio.create_task(traced(engine, True))] == ["request"]
        observer.trace = record_parts
        assert await asyncio.create_task(traced(engine, False)) == []
        *parts, request = await asyncio.create_task(traced(engine, True))
        assert [span.name for span in parts] == ["tokenize", "queue", "compute"]
        for span in (*parts, request):
            assert f"{span.context.trace_id:032x}" == PARENT[0]
        assert f"{request.parent.span_id:016x}" == PARENT[1]
        assert {span.parent.span_id for span in parts} == {request.context.span_id}
        assert [span.end_time for span in parts[:2]] == [span.start_time for span in parts[1:]]
        assert request.start_time <= parts[0].start_time
        assert parts[-1].end_time <= request.end_time
        assert (request.attributes["model"], request.attributes["texts"]) == ("main", 2)
        assert "secret" not in "".join(span.to_json() for span in (*parts, request))

    run(tiny, test)


def test_shadows_score_what_the_main_model_scored_and_explanations_are_no_traffic(tiny):
    models = [
        ServedModelSettings(name="main", path=str(tiny)),
        ServedModelSettings(name="next", path=str(tiny), shadow=True),
    ]
    audited: list[AuditRecord] = []

    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        observer.audit = audited.extend
        await engine.score(texts("a", "b"))
        await engine.score(texts("c"), model="next")
        REQUEST.set(RequestContext("other", "explain"))
        await engine.score(texts("d", "e", "f"))
        while not observer.metrics.counters["shadow_texts"].labels("next", engine.models()[1].version)._value.get():
            await asyncio.sleep(0.01)
        traffic = observer.take()
        # Of an explanation the text itself is audited: its score was answered.
        assert (traffic.texts, len(audited)) == (3, 4)
        [pairs] = traffic.shadows.values()
        assert pairs.live_scores.tolist() == pairs.shadow_scores.tolist()
        assert len(set(pairs.groups.tolist())) == 1

    run(tiny, test, models=models)
