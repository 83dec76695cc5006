"""The queue in front of the models: what shares a batch, in what order, and who leaves it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from rlhf_ray.config.serving import BatchingSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.serve.batcher import BatchRecord, MicroBatcher, ScoredBatch, gather_rows
from rlhf_ray.reward.serve.exchange import ModelInfo
from rlhf_ray.reward.serve.model_table import LoadedModel, Weights

POISON = 666


@dataclass
class StubScorer:
    """Stands in for the model: a text's score is the sum of its tokens. The queue is what is tested."""

    batches: list[list[int]] = field(default_factory=list)
    handed_over: int = 0
    # One thread: batches are computed in the order in which they were handed over.
    computing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def score_encoded(self, encoded: Sequence[Encoded]) -> ScoredBatch:
        return ScoredBatch(self._score(encoded), 0.001)

    def _score(self, encoded: Sequence[Encoded]) -> ScoredTexts:
        self.entered.set()
        assert self.gate.wait(20)
        sums = [sum(token_ids) for token_ids, _ in encoded]
        if POISON in sums:
            raise RuntimeError("a text that breaks the model")
        self.batches.append(sums)
        scores = np.array(sums, dtype=np.float64)
        count = len(sums)
        return ScoredTexts(
            scores[:, None, None],
            scores,
            np.zeros(count),
            ("",) * count,
            np.array([len(token_ids) for token_ids, _ in encoded]),
            np.zeros(count, dtype=bool),
            "v1",
        )


def stub_model(name: str = "stub") -> tuple[LoadedModel, StubScorer]:
    scorer = StubScorer()
    info = ModelInfo(name, name, 1.0, ("preference",), 1, 64, "float32", "live", 1.0)
    return LoadedModel(info, Weights("", name, ()), cast(Any, scorer), cast(Any, scorer), None), scorer


async def forward(model: LoadedModel, encoded: Sequence[Encoded]) -> ScoredBatch:
    scorer = cast(StubScorer, model.texts)
    scorer.handed_over += 1
    return await asyncio.get_running_loop().run_in_executor(scorer.computing, scorer.score_encoded, encoded)


def run(test: Callable[[MicroBatcher, list[BatchRecord]], Awaitable[None]], **settings: float) -> list[BatchRecord]:
    records: list[BatchRecord] = []

    async def main() -> None:
        batcher = MicroBatcher(BatchingSettings.model_validate(settings), forward, records.append)
        try:
            await asyncio.wait_for(test(batcher, records), 20)
        finally:
            await batcher.close()

    asyncio.run(main())
    return records


def texts(*values: int) -> list[Encoded]:
    return [([value], False) for value in values]


def scores(batched: Any) -> list[float]:
    return gather_rows(batched.rows).scores.tolist()


async def entered(scorer: StubScorer) -> None:
    """Until a batch is in the model, which holds it."""
    assert await asyncio.get_running_loop().run_in_executor(None, scorer.entered.wait, 20)


async def occupied(batcher: MicroBatcher, model: LoadedModel, scorer: StubScorer) -> asyncio.Task[Any]:
    """A batch of one text that holds the model until the gate opens."""
    task = asyncio.ensure_future(batcher.score(model, texts(0)))
    await entered(scorer)
    return task


def test_what_arrives_while_the_model_computes_shares_the_next_batch():
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, model, scorer)
        rest = [asyncio.ensure_future(batcher.score(model, texts(value, value + 100))) for value in (1, 2, 3)]
        await asyncio.sleep(0)
        scorer.gate.set()
        assert scores(await first) == [0]
        assert [scores(await each) for each in rest] == [[1, 101], [2, 102], [3, 103]]

    run(test, wait_ms=0)
    assert scorer.batches == [[0], [1, 101, 2, 102, 3, 103]]


def test_a_slow_small_batch_says_little_of_how_long_a_queue_takes():
    """As after a start or a quiet hour: one text took half a second, and a burst comes."""
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        probe = await occupied(batcher, model, scorer)
        await asyncio.sleep(0.5)
        scorer.gate.set()
        await probe
        scorer.gate.clear()
        burst = [asyncio.ensure_future(batcher.score(model, texts(value))) for value in range(40)]
        await asyncio.sleep(0)
        # Ten batches, each about as long as the one; token for token they would take as long as forty.
        assert 5.0 <= batcher.expected_wait_s() < 8.0
        scorer.gate.set()
        await asyncio.gather(*burst)
        # By now full batches have told, and they were quick.
        assert batcher.queued_tokens == 0
        scorer.gate.clear()
        again = [asyncio.ensure_future(batcher.score(model, texts(value))) for value in range(40)]
        await asyncio.sleep(0)
        assert batcher.expected_wait_s() < 1.0
        scorer.gate.set()
        await asyncio.gather(*again)

    run(test, max_tokens=4)


def test_batches_that_end_in_one_turn_of_the_loop_took_their_time():
    """As after a pause of the event loop: the second seems to have taken none."""
    model, scorer = stub_model()

    async def slow(model: LoadedModel, encoded: Sequence[Encoded]) -> ScoredBatch:
        return ScoredBatch((await forward(model, encoded)).scored, 0.5)

    async def main() -> None:
        batcher = MicroBatcher(BatchingSettings(wait_ms=0, max_texts=1), slow, lambda record: None)
        scorer.gate.set()
        await asyncio.gather(*(batcher.score(model, texts(value)) for value in range(8)))
        scorer.gate.clear()
        waiting = asyncio.ensure_future(batcher.score(model, texts(1, 2)))
        await asyncio.sleep(0)
        assert batcher.expected_wait_s() >= 1.0
        scorer.gate.set()
        await waiting
        await batcher.close()

    asyncio.run(main())


def test_the_next_batch_is_in_hand_before_the_present_one_is_done_and_no_other():
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        scorer.gate.set()
        await batcher.score(model, texts(5))  # how long a token takes
        scorer.gate.clear()
        scorer.entered.clear()
        first = await occupied(batcher, model, scorer)
        second = asyncio.ensure_future(batcher.score(model, texts(1)))
        while scorer.handed_over < 3:
            await asyncio.sleep(0.001)
        rest = [asyncio.ensure_future(batcher.score(model, texts(value))) for value in (2, 3)]
        await asyncio.sleep(0.1)  # far beyond the time that a batch is expected to take
        assert scorer.handed_over == 3
        scorer.gate.set()
        assert [scores(await each) for each in (first, second, *rest)] == [[0], [1], [2], [3]]

    run(test, wait_ms=0)
    assert scorer.batches == [[5], [0], [1], [2, 3]]


@pytest.mark.parametrize(
    ("limits", "batches"),
    [({"max_texts": 2}, [[1, 2], [3, 4], [5]]), ({"max_tokens": 3}, [[1, 2, 3], [4, 5]])],
)
def test_a_batch_keeps_to_its_budget_and_the_order_of_arrival(limits, batches):
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, model, scorer)
        rest = [asyncio.ensure_future(batcher.score(model, texts(value))) for value in (1, 2, 3, 4, 5)]
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, *rest)

    run(test, wait_ms=0, **limits)
    assert scorer.batches[1:] == batches


def test_a_text_beyond_the_budget_has_a_batch_of_its_own():
    model, scorer = stub_model()
    scorer.gate.set()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        assert scores(await batcher.score(model, [([1] * 50, False)])) == [50]

    run(test, max_tokens=10)


def test_a_cancelled_request_leaves_the_queue():
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, model, scorer)
        given_up = asyncio.ensure_future(batcher.score(model, texts(7, 8)))
        stays = asyncio.ensure_future(batcher.score(model, texts(9)))
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 4
        given_up.cancel()
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, stays)
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 0

    run(test, wait_ms=0)
    assert scorer.batches == [[0], [9]]


def test_one_text_that_breaks_the_model_does_not_break_its_neighbours():
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, model, scorer)
        sound = [asyncio.ensure_future(batcher.score(model, texts(value))) for value in (1, 2)]
        poisoned = asyncio.ensure_future(batcher.score(model, texts(3, POISON)))
        await asyncio.sleep(0)
        scorer.gate.set()
        await first
        assert [scores(await each) for each in sound] == [[1], [2]]
        with pytest.raises(ApiError) as caught:
            await poisoned
        assert (caught.value.type, caught.value.index) == (ErrorType.INTERNAL, 1)

    run(test, wait_ms=0)


def test_models_do_not_share_batches():
    one, scorer = stub_model("one")
    other, other_scorer = stub_model("other")
    other_scorer.gate.set()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, one, scorer)
        rest = [asyncio.ensure_future(batcher.score(m, texts(v))) for v, m in enumerate((one, other, one, other), 1)]
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, *rest)

    run(test, wait_ms=0)
    assert (scorer.batches, other_scorer.batches) == ([[0], [1, 3]], [[2, 4]])


def test_the_probe_goes_first():
    model, scorer = stub_model()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        first = await occupied(batcher, model, scorer)
        rest = asyncio.ensure_future(batcher.score(model, texts(1, 2)))
        probe = asyncio.ensure_future(batcher.score(model, texts(3), first=True))
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, rest, probe)

    run(test, wait_ms=0, max_texts=1)
    assert scorer.batches[1] == [3]


def test_the_probe_goes_before_the_texts_of_every_model():
    busy, scorer = stub_model("busy")
    other, other_scorer = stub_model("other")
    other_scorer.gate.set()
    order: list[str] = []

    async def test(batcher: MicroBatcher, records: list[BatchRecord]) -> None:
        first = await occupied(batcher, busy, scorer)
        rest = [asyncio.ensure_future(batcher.score(busy, texts(value))) for value in range(1, 21)]
        probe = asyncio.ensure_future(batcher.score(other, texts(50), first=True))
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, probe, *rest)
        order.extend(record.model.info.name for record in records)

    run(test, wait_ms=0, max_texts=1)
    # One batch computes, and one is in hand at the most.
    assert order.index("other") <= 2


def test_a_shadow_waits_for_the_live_texts_but_not_for_ever():
    live, scorer = stub_model("live")
    shadow, shadow_scorer = stub_model("shadow")
    shadow_scorer.gate.set()
    order: list[str] = []

    async def test(batcher: MicroBatcher, records: list[BatchRecord]) -> None:
        first = await occupied(batcher, live, scorer)
        unseen = asyncio.ensure_future(batcher.score_as_shadow(shadow, texts(50)))
        rest = [asyncio.ensure_future(batcher.score(live, texts(value))) for value in range(1, 21)]
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, unseen, *rest)
        order.extend(record.model.info.name for record in records)

    records = run(test, wait_ms=0, max_texts=1)
    place = order.index("shadow")
    assert 4 < place < 12
    assert [record.shadow for record in records].count(True) == 1


def test_an_idle_model_waits_for_company_only_so_long():
    model, scorer = stub_model()
    scorer.gate.set()

    async def test(batcher: MicroBatcher, _: list[BatchRecord]) -> None:
        batched = await batcher.score(model, texts(1))
        assert 0.04 < batched.queue_s < 5
        full = await asyncio.gather(*[batcher.score(model, texts(value)) for value in (1, 2)])
        assert max(each.queue_s for each in full) < 0.04

    run(test, wait_ms=50, max_texts=2)


def test_those_who_wait_when_it_closes_are_told():
    model, scorer = stub_model()

    async def main() -> None:
        batcher = MicroBatcher(BatchingSettings(), forward, lambda record: None)
        first = await occupied(batcher, model, scorer)
        waits = asyncio.ensure_future(batcher.score(model, texts(1)))
        await asyncio.sleep(0)
        await batcher.close()
        for each in (waits, first):
            with pytest.raises(ApiError, match="stopping"):
                await each
        scorer.gate.set()

    asyncio.run(main())
