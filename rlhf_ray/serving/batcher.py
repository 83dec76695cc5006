"""Texts of several requests in one forward pass.

Requests mostly bring one text, and a forward pass of sixty-four costs little more than one of ten. So texts wait in a
queue, and whenever the model is free the oldest of them, up to a budget of tokens, go through it together. Nothing
waits while the model is idle for longer than a few milliseconds, and nothing waits at all when enough is there.

First come, first served within a model: Serve's own `@serve.batch` puts a text that no longer fits behind all others,
knows neither of deadlines nor of several models, and hands one text's failure to all its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_ray.config.serving import BatchingSettings
from rlhf_ray.models.reward_texts import Encoded
from rlhf_ray.roles.reward_scorer import ScoredTexts
from rlhf_ray.serving.errors import ApiError, ErrorType
from rlhf_ray.serving.model_table import LoadedModel

_LIVE_BATCHES_A_SHADOW_BATCH = 8
"""Under full load the shadow gets every ninth batch: it must be compared in the traffic that matters most."""
_RATE_MEMORY = 0.9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchRecord:
    """One forward pass, for the metrics.

    Attributes:
        texts, tokens: in it.
        compute_s: how long it took.
    """

    model: LoadedModel
    texts: int
    tokens: int
    compute_s: float
    shadow: bool


@dataclass(frozen=True)
class BatchedScores:
    """Scores of one job's texts, in their order.

    Attributes:
        rows: the batch that each text was in, and its row there.
        queue_s: from submission to the first forward pass.
        compute_s: from there to the end of the last.
    """

    rows: tuple[tuple[ScoredTexts, int], ...]
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class _Job:
    model: LoadedModel
    future: asyncio.Future[BatchedScores]
    submitted: float
    missing: int
    rows: list[tuple[ScoredTexts, int] | None]
    started: float | None = None


@dataclass(eq=False)
class _Item:
    job: _Job
    index: int
    encoded: Encoded


@dataclass
class _Waiting:
    """Texts that wait for one model."""

    items: deque[_Item] = field(default_factory=deque)

    def drop_given_up(self) -> None:
        """Let go of texts at the head whose request was cancelled or ran out of time."""
        while self.items and self.items[0].job.future.done():
            self.items.popleft()


class MicroBatcher:
    """The queue in front of a replica's models.

    Args:
        settings: budgets.
        run: one forward pass; there is never more than one.
        observe: told of every forward pass.
    """

    def __init__(
        self,
        settings: BatchingSettings,
        run: Callable[[LoadedModel, Sequence[Encoded]], Awaitable[ScoredTexts]],
        observe: Callable[[BatchRecord], None],
    ) -> None:
        self._settings = settings
        self._run = run
        self._observe = observe
        self._live: dict[LoadedModel, _Waiting] = {}
        self._shadow: dict[LoadedModel, _Waiting] = {}
        self._live_since_shadow = 0
        self._arrived = asyncio.Event()
        self._tokens_per_s = 0.0
        self.queued_tokens = 0
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def score(self, model: LoadedModel, texts: Sequence[Encoded], *, first: bool = False) -> BatchedScores:
        """Scores of texts by one model; cancelling it takes the texts out of the queue.

        Args:
            first: go before all others (the probe of the health check).

        Raises:
            ApiError: a forward pass failed on one of these texts.
        """
        return await self._submit(self._live, model, texts, first)

    async def score_as_shadow(self, model: LoadedModel, texts: Sequence[Encoded]) -> BatchedScores:
        """As `score`, behind the texts that somebody waits for."""
        return await self._submit(self._shadow, model, texts, False)

    def expected_wait_s(self) -> float:
        """How long the texts in the queue will take at the rate of the last batches; 0 before the first."""
        return self.queued_tokens / self._tokens_per_s if self._tokens_per_s else 0.0

    async def close(self) -> None:
        """Stop; whoever still waits is told."""
        self._task.cancel()
        for queues in (self._live, self._shadow):
            for waiting in queues.values():
                for item in waiting.items:
                    if not item.job.future.done():
                        item.job.future.set_exception(ApiError(ErrorType.UNAVAILABLE, "the replica is stopping"))

    def _submit(
        self, queues: dict[LoadedModel, _Waiting], model: LoadedModel, texts: Sequence[Encoded], first: bool
    ) -> asyncio.Future[BatchedScores]:
        future: asyncio.Future[BatchedScores] = asyncio.get_running_loop().create_future()
        job = _Job(model, future, time.perf_counter(), len(texts), [None] * len(texts))
        items = [_Item(job, index, encoded) for index, encoded in enumerate(texts)]
        waiting = queues.setdefault(model, _Waiting())
        if first:
            waiting.items.extendleft(reversed(items))
        else:
            waiting.items.extend(items)
        if queues is self._live:
            tokens = sum(len(token_ids) for token_ids, _ in texts)
            self.queued_tokens += tokens
            future.add_done_callback(lambda _: self._leave(tokens))
        self._arrived.set()
        return future

    def _leave(self, tokens: int) -> None:
        self.queued_tokens -= tokens

    async def _serve(self) -> None:
        while True:
            queues = await self._next_queues()
            model, items = self._take(queues)
            if not items:
                continue
            started = time.perf_counter()
            for item in items:
                item.job.started = item.job.started or started
            texts = [item.encoded for item in items]
            try:
                scored = await self._run(model, texts)
            except Exception:
                logger.exception("a forward pass of %d texts failed; each is scored by itself", len(items))
                await self._score_singly(model, items)
                continue
            elapsed = time.perf_counter() - started
            tokens = sum(len(token_ids) for token_ids, _ in texts)
            if queues is self._live:
                rate = tokens / elapsed
                memory = _RATE_MEMORY if self._tokens_per_s else 0.0
                self._tokens_per_s = memory * self._tokens_per_s + (1 - memory) * rate
            self._observe(BatchRecord(model, len(items), tokens, elapsed, queues is self._shadow))
            for row, item in enumerate(items):
                self._deliver(item, scored, row)

    async def _score_singly(self, model: LoadedModel, items: Sequence[_Item]) -> None:
        """What fails with others may be the fault of one; the others get their scores."""
        for item in items:
            if item.job.future.done():
                continue
            try:
                scored = await self._run(model, [item.encoded])
            except Exception as error:
                logger.exception("a forward pass of one text failed")
                cause = ApiError(ErrorType.INTERNAL, f"the model failed ({type(error).__name__})", index=item.index)
                item.job.future.set_exception(cause)
                continue
            self._deliver(item, scored, 0)

    def _deliver(self, item: _Item, scored: ScoredTexts, row: int) -> None:
        job = item.job
        job.rows[item.index] = (scored, row)
        job.missing -= 1
        if job.missing == 0 and not job.future.done():
            started = job.started or job.submitted
            rows = tuple(each for each in job.rows if each is not None)
            job.future.set_result(BatchedScores(rows, started - job.submitted, time.perf_counter() - started))

    async def _next_queues(self) -> dict[LoadedModel, _Waiting]:
        """Wait until a batch is worth starting, and say whether it is of live texts or of the shadow's."""
        while True:
            oldest = self._oldest(self._live)
            if oldest is None and self._oldest(self._shadow) is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            shadow_waits = self._oldest(self._shadow) is not None
            if oldest is None or (shadow_waits and self._live_since_shadow >= _LIVE_BATCHES_A_SHADOW_BATCH):
                self._live_since_shadow = 0
                return self._shadow
            patience = oldest.job.submitted + self._settings.wait_ms / 1000 - time.perf_counter()
            if patience <= 0 or self._is_full(self._live[oldest.job.model]):
                self._live_since_shadow += 1
                return self._live
            self._arrived.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._arrived.wait()
            except TimeoutError:
                continue

    def _oldest(self, queues: dict[LoadedModel, _Waiting]) -> _Item | None:
        for model, waiting in list(queues.items()):
            waiting.drop_given_up()
            if not waiting.items:
                del queues[model]
        heads = [waiting.items[0] for waiting in queues.values()]
        return min(heads, key=lambda item: item.job.submitted, default=None)

    def _is_full(self, waiting: _Waiting) -> bool:
        if len(waiting.items) >= self._settings.max_texts:
            return True
        return sum(len(item.encoded[0]) for item in waiting.items) >= self._settings.max_tokens

    def _take(self, queues: dict[LoadedModel, _Waiting]) -> tuple[LoadedModel, list[_Item]]:
        """The oldest texts that fit, all for one model."""
        oldest = self._oldest(queues)
        assert oldest is not None, "a queue with texts was chosen"
        waiting, tokens = queues[oldest.job.model].items, 0
        taken: list[_Item] = []
        while waiting and len(taken) < self._settings.max_texts:
            item = waiting[0]
            size = len(item.encoded[0])
            if taken and tokens + size > self._settings.max_tokens:
                break
            waiting.popleft()
            if not item.job.future.done():
                taken.append(item)
                tokens += size
        return oldest.job.model, taken


def gather_rows(rows: Sequence[tuple[ScoredTexts, int]]) -> ScoredTexts:
    """Texts that were scored in several batches, as if in one."""
    return ScoredTexts(
        heads=np.stack([scored.heads[row] for scored, row in rows]),
        scores=np.array([scored.scores[row] for scored, row in rows]),
        disagreement=np.array([scored.disagreement[row] for scored, row in rows]),
        failures=tuple(scored.failures[row] for scored, row in rows),
        num_tokens=np.array([scored.num_tokens[row] for scored, row in rows]),
        truncated=np.array([scored.truncated[row] for scored, row in rows]),
        version=rows[0][0].version,
    )
