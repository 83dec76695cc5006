"""What the engine admits, what it refuses, and what it tells of it. The model behind is a stub that adds up token ids;
tokenizer and limits are those of the tiny reward model."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from rlhf_ray.config.serving import (
    BatchingSettings,
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
from rlhf_ray.reward.serve.batcher import MicroBatcher, ScoredBatch
from rlhf_ray.reward.serve.context import REQUEST, RequestContext
from rlhf_ray.reward.serve.engine import RewardEngine
from rlhf_ray.reward.serve.exchange import ScoreInput
from rlhf_ray.reward.serve.model_table import Weights
from rlhf_ray.reward.serve.observations import Observer


class StubProcess:
    """Stands in for the scoring process."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.loaded: list[str] = []
        self.broken: set[str] = set()

    async def load(self, weights: Weights) -> None:
        if weights.key not in self.loaded:
            self.loaded.append(weights.key)

    async def keep_only(self, keys: Sequence[str]) -> None:
        self.loaded = [key for key in self.loaded if key in keys]

    async def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
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
        waiting = asyncio.ensure_future(engine.score(texts("word " * 400_000)))
        pauses, last = [], time.perf_counter()
        while not waiting.done():
            await asyncio.sleep(0.002)
            pauses.append(time.perf_counter() - last)
            last = time.perf_counter()
        assert len(pauses) > 20
        assert max(pauses) < sum(pauses) / 3
        assert waiting.result().scores[0].score == short

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


def test_a_score_that_is_no_number_is_an_error_and_counted(tiny):
    async def test(engine: RewardEngine, process: StubProcess, observer: Observer) -> None:
        process.broken.add("reward_model")
        error = await refused(engine.score(texts("a", "b")))
        assert (error.type, error.index) == (ErrorType.UNSCORABLE, 0)
        assert (await refused(engine.probe(5))).type is ErrorType.UNAVAILABLE

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
