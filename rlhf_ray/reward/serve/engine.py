"""The service behind the protocols, one in each replica."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from rlhf_ray.config.serving import LimitSettings, ServedModelSettings, ServedScorerSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.serve.batcher import BatchedScores, MicroBatcher, gather_rows
from rlhf_ray.reward.serve.context import REQUEST, Caller, RequestContext
from rlhf_ray.reward.serve.exchange import Answer, ModelInfo, Score, ScoreInput, Timings
from rlhf_ray.reward.serve.model_table import PROBE, LoadedModel, ModelTable, read_table
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.scorer_process import ScorerProcess
from rlhf_ray.reward.serve.traffic import Pace

_LET_GO_POLL_S = 0.1
_SCORE_HOLDS_S = 2.0
"""A model that has scored a text is known for so long to score. Under load nobody who asks has to wait for a batch."""
_TIMING_ROUNDS, _TIMING_TEXTS = 5, 16
_TEXTS_BETWEEN_PAUSES = 8
"""Tokenizing takes turns with other requests after so many texts."""
_SHORT_CHARACTERS = 1 << 15
"""Longer requests are tokenized in a thread: megabytes take seconds, in which nobody else would be answered."""

_MODEL_FAULTS = (ErrorType.UNSCORABLE, ErrorType.INTERNAL)
_OWN_FAMILIES = ("own", "explain")

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class RewardEngine:
    """Scores for all protocols: admission, tokens, batches, and what is told of them.

    Args:
        scorer: how texts are scored.
        limits: what is refused.
        process: where the models compute.
        batcher: the queue in front of the models.
        observer: what is kept of the traffic.
    """

    def __init__(
        self,
        scorer: ServedScorerSettings,
        limits: LimitSettings,
        process: ScorerProcess,
        batcher: MicroBatcher,
        observer: Observer,
    ) -> None:
        self._scorer = scorer
        self._limits = limits
        self._batcher = batcher
        self._observer = observer
        self._table = ModelTable(())
        self._process = process
        self._using: Counter[str] = Counter()
        self._requests = 0
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self.paces: dict[str, Pace] = {}
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._probing = asyncio.Lock()
        self._scored_at: dict[str, float] = {}

    @property
    def table(self) -> ModelTable:
        """The models of this moment."""
        return self._table

    @property
    def queued_requests(self) -> int:
        """Requests admitted and not yet answered."""
        return self._requests

    async def load(self, models: Sequence[ServedModelSettings]) -> None:
        """Bring a table of models into memory beside the present one, and swap.

        Raises:
            BadInput, Refused: a model cannot be served; the present table stays.
        """
        table = await asyncio.to_thread(read_table, models, self._scorer, self._table)
        try:
            for model in table.models:
                await self._process.load(model.weights)
                await self._try(model)
            self.paces = await self._time(table)
            self._table = table
            self._scored_at = {}
        finally:
            # Of the old table, or of one that could not be loaded whole.
            await self._let_go()

    async def _try(self, model: LoadedModel) -> None:
        """See that a model that was loaded scores.

        Raises:
            BadInput: it does not.
        """
        scored = (await self._process.score(model.key, [model.texts.encode(PROBE)])).scored
        if scored.failures[0]:
            raise BadInput(
                f"models.{model.info.name}",
                f"'{model.weights.path}' cannot score a plain sentence ({scored.failures[0]})",
                "a sound model",
            )

    async def _time(self, table: ModelTable) -> dict[str, Pace]:
        """Time each candidate and the main model on the same batch, in turns; traffic gives them batches of other
        sizes, which take other times a token."""
        main, *others = (*table.live, *table.shadows)
        paces = {}
        for model in others:
            seconds: dict[str, list[float]] = {main.key: [], model.key: []}
            for _ in range(_TIMING_ROUNDS):
                for each in (main, model):
                    texts = [each.texts.encode(PROBE)] * _TIMING_TEXTS
                    seconds[each.key].append((await self._process.score(each.key, texts)).compute_s)
            tokens = _TIMING_TEXTS * len(main.texts.encode(PROBE)[0])
            paces[model.info.name] = Pace(min(seconds[model.key]), min(seconds[main.key]), tokens)
        return paces

    async def _let_go(self) -> None:
        """Forget models that are no longer in the table, once nobody waits for them."""
        kept = {model.key for model in self._table.models}
        while any(count and key not in kept for key, count in self._using.items()):
            await asyncio.sleep(_LET_GO_POLL_S)
        await self._process.keep_only([model.key for model in self._table.models])
        self._observer.keep_only([model.info.id for model in self._table.models])

    def models(self) -> tuple[ModelInfo, ...]:
        """The models, the one with the largest share first."""
        return tuple(model.info for model in (*self._table.live, *self._table.shadows))

    async def tokenizing(self, work: Callable[[RewardTexts], Result], model: str | None = None) -> Result:
        """Let a function read texts as a model does, in the thread of long texts; see `Tokenizing`."""
        texts = self._find(model).long_texts
        async with self._in_time(REQUEST.get()):
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, texts)

    @asynccontextmanager
    async def _in_time(self, context: RequestContext) -> AsyncIterator[None]:
        """Give a request up at its deadline.

        Raises:
            ApiError: it is past.
        """
        limits = self._limits
        try:
            async with asyncio.timeout(context.started + limits.deadline_s - time.perf_counter()):
                yield
        except TimeoutError:
            cause = f"not scored within {limits.deadline_s:g} s"
            raise ApiError(ErrorType.DEADLINE, cause, retry_after_s=limits.retry_after_s) from None

    async def probe(self, timeout_s: float) -> None:
        """See that every model scores: it has just done so, or scores a sentence now, before all who wait.

        Raises:
            ApiError: a model did not score it within the time.
        """
        self._find(None)
        for model in self._table.models:
            try:
                async with asyncio.timeout(timeout_s), self._probing:
                    if time.monotonic() - self._scored_at.get(model.key, -math.inf) > _SCORE_HOLDS_S:
                        await self._probe(model)
            except TimeoutError:
                cause = f"model {model.info.name} scored nothing within {timeout_s:g} s"
                raise ApiError(ErrorType.UNAVAILABLE, cause) from None

    def check_ready(self) -> None:
        """See, without scoring anything, that texts are scored here. A full queue is no fault: it passes.

        Raises:
            ApiError: no live model is in memory, or the replica is stopping.
        """
        self._find(None)
        self._process.check(model.key for model in self._table.live)
        self._batcher.check()

    async def _probe(self, model: LoadedModel) -> None:
        batched = await self._batcher.score(model, [model.texts.encode(PROBE)], first=True)
        scored, row = batched.rows[0]
        if not math.isfinite(scored.scores[row]):
            raise ApiError(ErrorType.UNAVAILABLE, f"model {model.info.name} returns no finite score")
        self._scored_at[model.key] = time.monotonic()

    async def score(
        self, inputs: Sequence[ScoreInput], *, model: str | None = None, sticky: str | None = None
    ) -> Answer:
        """Score all inputs by one version of one model; see `Service`."""
        context = REQUEST.get()
        chosen = self._choose(model, sticky or context.request_id)
        if not inputs:
            return Answer((), chosen.info)
        self._admit(len(inputs), context.caller)
        # `Front` holds the first.
        with context.caller.holding(len(inputs) - 1, self._limits.retry_after_s):
            self._requests += 1
            self._using[chosen.key] += 1
            try:
                async with self._in_time(context):
                    began = time.perf_counter()
                    _check_cuts(inputs, chosen)
                    encoded = await self._encode(inputs, chosen)
                    tokenized = time.perf_counter()
                    batched = await self._score(chosen, encoded)
            finally:
                self._requests -= 1
                self._using[chosen.key] -= 1
        scored, timings = gather_rows(batched.rows), Timings(tokenized - began, batched.queue_s, batched.compute_s)
        if context.family == "explain":
            # The text itself comes first. The others have words left out, and none of them is traffic.
            self._observer.record(context, chosen, encoded[:1], scored)
        else:
            # Before a text without a score refuses them all: what a model fails at is counted.
            self._observer.scored(context, chosen, encoded, scored, timings)
        answer = Answer(_as_scores(scored, chosen), chosen.info, timings)
        self._scored_at[chosen.key] = time.monotonic()
        if context.family != "explain":
            self._cast_shadows(context.request_id, chosen, inputs, scored)
        return answer

    async def _score(self, model: LoadedModel, encoded: Sequence[Encoded]) -> BatchedScores:
        try:
            return await self._batcher.score(model, encoded)
        except ApiError as error:
            if error.type in _MODEL_FAULTS and REQUEST.get().family != "explain":
                self._observer.failed(model, len(encoded))
            raise

    def _find(self, name: str | None) -> LoadedModel:
        if not self._table.live:
            raise ApiError(ErrorType.UNAVAILABLE, "no model is loaded yet", retry_after_s=self._limits.retry_after_s)
        return self._table.live[0] if name is None else self._choose(name, "")

    def _choose(self, name: str | None, sticky: str) -> LoadedModel:
        """The model of a request. Clients of the other protocols must send some name, and may send any."""
        self._find(None)
        context = REQUEST.get(None)
        is_foreign = context is not None and context.family not in _OWN_FAMILIES
        return self._table.choose(name, sticky, any_name=is_foreign)

    def _admit(self, num_texts: int, caller: Caller) -> None:
        """Admission control of what was read; of requests as such, see `Front`.

        Raises:
            ApiError: too many texts, or a queue longer than the deadline.
        """
        limits = self._limits
        # What is more than its caller may ever have is too large: to try again would not help.
        if num_texts > (most := min(limits.max_texts, caller.max_texts)):
            raise ApiError(ErrorType.TOO_LARGE, f"{num_texts} texts in one request; at most {most} are taken")
        if self._batcher.expected_wait_s() > limits.deadline_s:
            raise ApiError(
                ErrorType.OVERLOADED,
                f"the queue is longer than the deadline of {limits.deadline_s:g} s",
                retry_after_s=limits.retry_after_s,
            )

    async def _encode(self, inputs: Sequence[ScoreInput], model: LoadedModel) -> list[Encoded]:
        """Token ids of every input.

        Raises:
            ApiError: an input cannot be scored, or all together have too many tokens.
        """
        encoded: list[Encoded] = []
        total = 0
        is_long = sum(map(_num_characters, inputs)) > _SHORT_CHARACTERS
        for index, each in enumerate(inputs):
            if is_long:
                token_ids, was_cut = await asyncio.get_running_loop().run_in_executor(
                    self._tokenizing, _tokens_of, each, index, model, model.long_texts
                )
            else:
                if index and index % _TEXTS_BETWEEN_PAUSES == 0:
                    await asyncio.sleep(0)
                token_ids, was_cut = _tokens_of(each, index, model, model.texts)
            on_too_long = self._scorer.on_too_long if each.on_too_long == "default" else each.on_too_long
            if was_cut and on_too_long == "fail":
                limit = min(each.max_tokens or model.info.max_length, model.info.max_length)
                raise ApiError(ErrorType.TOO_LARGE, f"text {index} is longer than {limit} tokens", index=index)
            if not token_ids:
                raise ApiError(ErrorType.UNSCORABLE, f"text {index} has no tokens", index=index)
            total += len(token_ids)
            encoded.append((token_ids, was_cut))
        if total > self._limits.max_tokens:
            raise ApiError(
                ErrorType.TOO_LARGE, f"{total} tokens in one request; at most {self._limits.max_tokens} are taken"
            )
        return encoded

    def _cast_shadows(
        self, request_id: str, live: LoadedModel, inputs: Sequence[ScoreInput], scored: ScoredTexts
    ) -> None:
        """Let candidates score the texts of the main model too, where nobody waits for them."""
        if live is not self._table.live[0]:
            return
        for shadow in self._table.shadows:
            if shadow is not live and self._observer.wants_shadow(shadow, request_id, len(inputs)):
                task = asyncio.get_running_loop().create_task(
                    self._shadow(request_id, live, shadow, tuple(inputs), scored)
                )
                self._shadow_tasks.add(task)
                task.add_done_callback(self._shadow_tasks.discard)

    async def _shadow(
        self,
        request_id: str,
        live: LoadedModel,
        shadow: LoadedModel,
        inputs: Sequence[ScoreInput],
        scored: ScoredTexts,
    ) -> None:
        self._using[shadow.key] += 1
        try:
            batched = await self._batcher.score_as_shadow(shadow, await self._encode(inputs, shadow))
            self._observer.shadowed(request_id, live, shadow, scored, gather_rows(batched.rows))
            self._scored_at[shadow.key] = time.monotonic()
        except ApiError as error:
            told = self._observer.shadow_failed if error.type in _MODEL_FAULTS else self._observer.shadow_skipped
            told(shadow, len(inputs))
        except Exception:  # nobody waits for it
            logger.exception("the shadow %s failed", shadow.info.name)
            self._observer.shadow_failed(shadow, len(inputs))
        finally:
            self._using[shadow.key] -= 1


def _check_cuts(inputs: Sequence[ScoreInput], model: LoadedModel) -> None:
    """A request that asks for more tokens than its model takes expects another model than it got; vLLM refuses it too.

    Raises:
        ApiError: naming the first such input.
    """
    for index, each in enumerate(inputs):
        if each.max_tokens is not None and each.max_tokens > model.info.max_length:
            raise ApiError(
                ErrorType.BAD_REQUEST,
                f"text {index} is to be cut to {each.max_tokens} tokens; the model takes at most "
                f"{model.info.max_length}",
                index=index,
            )


def _num_characters(each: ScoreInput) -> int:
    messages = each.messages or ()
    return len(each.text or "") + len(each.token_ids or ()) + sum(len(str(message["content"])) for message in messages)


def _tokens_of(each: ScoreInput, index: int, model: LoadedModel, reader: RewardTexts) -> Encoded:
    try:
        if each.text is not None:
            # Lone surrogates are no text: tokenizers refuse them.
            each.text.encode("utf-8")
            return reader.encode(each.text, templated=each.templated, max_tokens=each.max_tokens, keep=each.keep)
        if each.messages is not None:
            for message in each.messages:
                str(message["content"]).encode("utf-8")
            return reader.encode_messages(each.messages, max_tokens=each.max_tokens, keep=each.keep)
    except RowError as error:
        raise ApiError(ErrorType.BAD_REQUEST, f"text {index}: {error}", index=index) from None
    except UnicodeEncodeError:
        raise ApiError(ErrorType.BAD_REQUEST, f"text {index} is not valid Unicode", index=index) from None
    token_ids = list(each.token_ids or ())
    vocabulary = len(reader.tokenizer)
    if any(not 0 <= token < vocabulary for token in token_ids):
        raise ApiError(ErrorType.BAD_REQUEST, f"text {index} has token ids outside 0…{vocabulary - 1}", index=index)
    limit = min(each.max_tokens or model.info.max_length, model.info.max_length)
    if len(token_ids) <= limit:
        return token_ids, False
    return token_ids[:limit] if each.keep == "start" else token_ids[-limit:], True


def _as_scores(scored: ScoredTexts, model: LoadedModel) -> tuple[Score, ...]:
    """As the protocols see them.

    Raises:
        ApiError: a text has no finite score; a failure is never a number.
    """
    scores = []
    for row, failure in enumerate(scored.failures):
        if failure or not math.isfinite(scored.scores[row]):
            raise ApiError(ErrorType.UNSCORABLE, f"text {row}: {failure or 'no finite score'}", index=row)
        attributes = scored.heads[row].mean(axis=1)
        scores.append(
            Score(
                score=float(scored.scores[row]),
                attributes={name: float(value) for name, value in zip(model.info.attributes, attributes, strict=True)},
                disagreement=float(scored.disagreement[row]),
                num_tokens=int(scored.num_tokens[row]),
                truncated=bool(scored.truncated[row]),
            )
        )
    return tuple(scores)
