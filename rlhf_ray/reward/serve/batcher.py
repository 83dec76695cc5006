"""Texts of several requests in one forward pass.

Requests mostly bring one text, and a forward pass of sixty-four costs little more than one of ten. So texts wait in a
queue, and whenever the model is about to be free the oldest of them, up to a budget of tokens, go through it together.
Nothing waits while the model is idle for longer than a few milliseconds, and nothing waits at all when enough is there.

First come, first served within a model: Serve's own `@serve.batch` puts a text that no longer fits behind all others,
knows neither of deadlines nor of several models, and hands one text's failure to all its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_ray.config.serving import BatchingSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.serve.model_table import LoadedModel

_LIVE_BATCHES_A_SHADOW_BATCH = 8
"""Under full load the shadow gets every ninth batch: it must be compared in the traffic that matters most."""
_RATE_MEMORY = 0.9
_MOST_FLIGHTS = 2
"""The scoring process has the next batch in hand when it is done with one, and need not wait for the way back and
forth: a few hundredths of a batch's time on a CPU, and more where a batch takes milliseconds."""
_LEAD_S = 0.03
"""So long before the end of a batch, as the last ones foretell it, the next is handed over."""

logger = logging.getLogger(__name__)


class ProcessDied(Exception):
    """The scoring process ended during a forward pass, whatever it died of; another one is there."""


@dataclass(frozen=True)
class ScoredBatch:
    """One forward pass.

    Attributes:
        compute_s: of the models alone, without the way there and back or a wait for the pass before.
    """

    scored: ScoredTexts
    compute_s: float


@dataclass(frozen=True)
class BatchRecord:
    """One forward pass, for the metrics.

    Attributes:
        texts, tokens: in it.
        compute_s: how long the model took.
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
    first: bool = False
    started: float | None = None


@dataclass(eq=False)
class _Item:
    job: _Job
    index: int
    encoded: Encoded


@dataclass(eq=False)
class _Flight:
    """A batch that was handed over.

    Attributes:
        began: when, or when the one before was done.
        is_full: it has as much as a batch may have.
    """

    items: list[_Item]
    tokens: int
    began: float
    is_full: bool
    task: asyncio.Task[None] | None = None


@dataclass
class _Waiting:
    """Texts that wait for one model."""

    items: deque[_Item] = field(default_factory=deque)

    def drop_given_up(self) -> None:
        """Let go of texts at the head whose request was cancelled or ran out of time."""
        while self.items and self.items[0].job.future.done():
            self.items.popleft()


@dataclass
class _Pace:
    """How fast batches go through the model, from the last ones.

    A batch of one text takes nearly as long as one of sixty-four, and the first of all longer still. At the pace of
    small batches a burst after a quiet hour would seem to take minutes, so only full ones tell how long a queue takes.
    Until there was one, a queue takes as many batches as it fills, each as long as the last ones did.

    Attributes:
        tokens_per_s: of all batches.
        full_tokens_per_s: of full ones; 0 before the first.
        batch_s: of one batch, whatever was in it.
    """

    tokens_per_s: float = 0.0
    full_tokens_per_s: float = 0.0
    batch_s: float = 0.0

    def record(self, tokens: int, seconds: float, is_full: bool) -> None:
        """Take a batch into account."""
        self.tokens_per_s = _smoothed(self.tokens_per_s, tokens / seconds)
        self.batch_s = _smoothed(self.batch_s, seconds)
        if is_full:
            self.full_tokens_per_s = _smoothed(self.full_tokens_per_s, tokens / seconds)

    def expected_s(self, tokens: int, max_tokens: int) -> float:
        """How long a queue of so many tokens takes; 0 before the first batch."""
        if self.full_tokens_per_s:
            return tokens / self.full_tokens_per_s
        return math.ceil(tokens / max_tokens) * self.batch_s


def _smoothed(before: float, now: float) -> float:
    memory = _RATE_MEMORY if before else 0.0
    return memory * before + (1 - memory) * now


class MicroBatcher:
    """The queue in front of a replica's models.

    Args:
        settings: budgets.
        run: one forward pass; at most one more is asked for before it is done, and waits for it.
        observe: told of every forward pass.
    """

    def __init__(
        self,
        settings: BatchingSettings,
        run: Callable[[LoadedModel, Sequence[Encoded]], Awaitable[ScoredBatch]],
        observe: Callable[[BatchRecord], None],
    ) -> None:
        self._settings = settings
        self._run = run
        self._observe = observe
        self._live: dict[LoadedModel, _Waiting] = {}
        self._shadow: dict[LoadedModel, _Waiting] = {}
        self._live_since_shadow = 0
        self._changed = asyncio.Event()
        self._flights: list[_Flight] = []
        self._suspects = 0
        self._alone = asyncio.Lock()
        self._pace = _Pace()
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
        """How long the texts in the queue will take at the pace of the last batches; 0 before the first."""
        return self._pace.expected_s(self.queued_tokens, self._settings.max_tokens)

    def check(self) -> None:
        """See that what is put into the queue is taken out of it.

        Raises:
            ApiError: it is not any more.
        """
        if self._task.done() or self._task.cancelling():
            raise ApiError(ErrorType.UNAVAILABLE, "the replica is stopping")

    async def close(self) -> None:
        """Stop; whoever still waits is told."""
        self._task.cancel()
        left = [item for flight in self._flights for item in flight.items]
        left += [item for queues in (self._live, self._shadow) for each in queues.values() for item in each.items]
        for flight in self._flights:
            if flight.task is not None:
                flight.task.cancel()
        for item in left:
            if not item.job.future.done():
                item.job.future.set_exception(ApiError(ErrorType.UNAVAILABLE, "the replica is stopping"))

    def _submit(
        self, queues: dict[LoadedModel, _Waiting], model: LoadedModel, texts: Sequence[Encoded], first: bool
    ) -> asyncio.Future[BatchedScores]:
        future: asyncio.Future[BatchedScores] = asyncio.get_running_loop().create_future()
        job = _Job(model, future, time.perf_counter(), len(texts), [None] * len(texts), first=first)
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
        self._changed.set()
        return future

    def _leave(self, tokens: int) -> None:
        self.queued_tokens -= tokens

    async def _serve(self) -> None:
        while True:
            queues = await self._next_queues()
            model, items, is_full = self._take(queues)
            if not items:
                continue
            tokens = sum(len(item.encoded[0]) for item in items)
            flight = _Flight(items, tokens, time.perf_counter(), is_full)
            self._flights.append(flight)
            flight.task = asyncio.get_running_loop().create_task(self._fly(flight, model, queues is self._shadow))

    async def _fly(self, flight: _Flight, model: LoadedModel, shadow: bool) -> None:
        """One forward pass, from the hand-over to the answers."""
        items = flight.items
        try:
            batch = await self._run(model, [item.encoded for item in items])
        except ApiError as error:
            for item in items:
                _fail(item, error)
        except Exception:
            logger.exception("a forward pass of %d texts failed; each is scored by itself", len(items))
            self._suspects += 1
            try:
                await self._score_singly(model, items)
            finally:
                self._suspects -= 1
        else:
            if not shadow:
                # Two that end in one turn of the event loop leave no time between them.
                seconds = max(time.perf_counter() - flight.began, batch.compute_s)
                self._pace.record(flight.tokens, seconds, flight.is_full)
            self._observe(BatchRecord(model, len(items), flight.tokens, batch.compute_s, shadow))
            for row, item in enumerate(items):
                self._deliver(item, batch, row)
        finally:
            self._flights.remove(flight)
            for later in self._flights:
                later.began = time.perf_counter()
            self._changed.set()

    async def _score_singly(self, model: LoadedModel, items: Sequence[_Item]) -> None:
        """What fails with others may be the fault of one; the others get their scores. Nothing else is computed
        meanwhile: a text that the process dies of is known by that it was alone there."""
        for item in items:
            async with self._alone:
                if item.job.future.done():
                    continue
                try:
                    batch = await self._run(model, [item.encoded])
                except ApiError as error:
                    _fail(item, error)
                except ProcessDied:
                    logger.error("the scoring process died twice of one text")
                    _fail(item, ApiError(ErrorType.UNSCORABLE, "the model does not survive it", index=item.index))
                except Exception as error:
                    logger.exception("a forward pass of one text failed")
                    cause = f"the model failed ({type(error).__name__})"
                    _fail(item, ApiError(ErrorType.INTERNAL, cause, index=item.index))
                else:
                    self._deliver(item, batch, 0)

    def _deliver(self, item: _Item, batch: ScoredBatch, row: int) -> None:
        job, now = item.job, time.perf_counter()
        if job.started is None:
            job.started = max(job.submitted, now - batch.compute_s)
        job.rows[item.index] = (batch.scored, row)
        job.missing -= 1
        if job.missing == 0 and not job.future.done():
            rows = tuple(each for each in job.rows if each is not None)
            job.future.set_result(BatchedScores(rows, job.started - job.submitted, now - job.started))

    async def _next_queues(self) -> dict[LoadedModel, _Waiting]:
        """Wait until a batch is worth handing over, and say whether it is of live texts or of the shadow's."""
        while True:
            self._changed.clear()
            queues, ready_at = self._next_start()
            if queues is not None and ready_at <= time.perf_counter():
                self._live_since_shadow = 0 if queues is self._shadow else self._live_since_shadow + 1
                return queues
            try:
                async with asyncio.timeout(None if ready_at == math.inf else ready_at - time.perf_counter()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _next_start(self) -> tuple[dict[LoadedModel, _Waiting] | None, float]:
        """Which queue comes next, and when, as things stand; never where something has to change first."""
        if len(self._flights) >= _MOST_FLIGHTS or self._suspects:
            return None, math.inf
        oldest = self._oldest(self._live)
        if self._oldest(self._shadow) is not None:
            its_turn = self._live_since_shadow >= _LIVE_BATCHES_A_SHADOW_BATCH
            # But for that, what nobody waits for is not put in front of those who may come any moment.
            if its_turn or (oldest is None and not self._flights):
                return self._shadow, -math.inf
        if oldest is None:
            return None, math.inf
        if self._is_full(self._live[oldest.job.model]):
            return self._live, -math.inf
        patience_ends = oldest.job.submitted + self._settings.wait_ms / 1000
        return self._live, max(patience_ends, *(self._hand_over_at(flight) for flight in self._flights), -math.inf)

    def _hand_over_at(self, flight: _Flight) -> float:
        """A moment before the model is done with a batch: the longer the next one waits here, the fuller it is."""
        if not self._pace.tokens_per_s:
            return math.inf
        expected_s = flight.tokens / self._pace.tokens_per_s
        return flight.began + expected_s - min(_LEAD_S, expected_s / 2)

    def _oldest(self, queues: dict[LoadedModel, _Waiting]) -> _Item | None:
        for model, waiting in list(queues.items()):
            waiting.drop_given_up()
            if not waiting.items:
                del queues[model]
        heads = [waiting.items[0] for waiting in queues.values()]
        return min(heads, key=lambda item: (not item.job.first, item.job.submitted), default=None)

    def _is_full(self, waiting: _Waiting) -> bool:
        if len(waiting.items) >= self._settings.max_texts:
            return True
        return sum(len(item.encoded[0]) for item in waiting.items) >= self._settings.max_tokens

    def _take(self, queues: dict[LoadedModel, _Waiting]) -> tuple[LoadedModel, list[_Item], bool]:
        """The oldest texts that fit, all for one model, and whether no more would."""
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
        is_full = bool(waiting) or len(taken) >= self._settings.max_texts or tokens >= self._settings.max_tokens
        return oldest.job.model, taken, is_full


def _fail(item: _Item, error: ApiError) -> None:
    if not item.job.future.done():
        item.job.future.set_exception(error)


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
