"""The process beside a replica in which its models compute.

A forward pass of short texts is thousands of small steps that each need Python's interpreter lock, and so does every
request that comes in: in one process they take turns, and a third of the throughput is gone. Apart, they share
nothing but a batch's token ids and its scores. And what can kill a model (memory, a kernel) leaves the replica alive:
it starts the process again, and those who wait get their scores a little later. A process that dies again and again is
started again after longer and longer pauses.

A directory may hold other weights by then. A process takes only what is still the version that it was ordered to
have; a model that is lost that way answers nothing, until Serve has replaced the replica, or another order came.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.serving import ServedScorerSettings
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.serve.batcher import ProcessDied, ScoredBatch
from rlhf_ray.reward.serve.model_table import Weights
from rlhf_ray.runtime.actor_group import environment

_NICENESS = 10
_DEATHS = (RayActorError, OutOfMemoryError)
"""How Ray says that the process is gone; the second where Ray itself ended it, because the node's memory was full."""
_RECENT_S = 60.0
_LONGEST_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


class ScorerHost:
    """The models of one replica, in a process of their own.

    Args:
        settings: how they score.
    """

    def __init__(self, settings: ServedScorerSettings) -> None:
        self._settings = settings
        self._scorers: dict[str, RewardScorer] = {}
        self._computing = threading.Lock()
        # Where cores are short, the replica comes first: it must refuse at once what cannot be scored in time.
        os.nice(_NICENESS)

    def load(self, weights: Weights) -> None:
        """Bring a model into memory, if it is not there.

        Raises:
            BadInput: its weights cannot be used, or are others by now.
        """
        if weights.key not in self._scorers:
            scorer = RewardScorer(reward_settings(self._settings, weights.path))
            # Afterwards: what is still there now is what was read.
            weights.check()
            self._scorers[weights.key] = scorer

    def keep_only(self, keys: Sequence[str]) -> None:
        """Let go of all other models."""
        self._scorers = {key: scorer for key, scorer in self._scorers.items() if key in keys}

    def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
        """One forward pass, once the one before is done."""
        with self._computing:
            started = time.perf_counter()
            scored = self._scorers[key].score_encoded(texts)
            return ScoredBatch(scored, time.perf_counter() - started)


def reward_settings(settings: ServedScorerSettings, path: str) -> RewardSettings:
    """Of a scorer for one of the service's models."""
    return RewardSettings(
        model=path,
        require_release=settings.require_release,
        # The service says itself what becomes of a long text, request by request.
        on_too_long="truncate",
        **settings.model_dump(exclude={"on_too_long", "require_release"}),
    )


@dataclass(frozen=True)
class _Running:
    host: Any
    number: int


class ScorerProcess:
    """A replica's hold on its process; starts it again when it dies.

    Args:
        settings: how models score, and what the process is given.
        host: what is in it.
    """

    def __init__(self, settings: ServedScorerSettings, host: type[ScorerHost] = ScorerHost) -> None:
        self._settings = settings
        self._host = host
        self._weights: dict[str, Weights] = {}
        self._deaths: deque[float] = deque(maxlen=16)
        self._replacing = asyncio.Lock()
        self._running = self._start(0)

    @property
    def restarts(self) -> int:
        """How often it died."""
        return self._running.number

    async def load(self, weights: Weights) -> None:
        """Bring a model into the process's memory.

        Raises:
            ProcessDied: twice.
            ray.exceptions.RayTaskError: as the `BadInput` that says why it cannot be used.
        """
        try:
            await self._call("load", weights)
        except ProcessDied:
            await self._call("load", weights)
        self._weights[weights.key] = weights

    async def keep_only(self, keys: Sequence[str]) -> None:
        """Let go of all other models, also of one whose load was given up."""
        self._weights = {key: weights for key, weights in self._weights.items() if key in keys}
        with suppress(ProcessDied):  # the next one has these alone
            await self._call("keep_only", list(keys))

    async def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
        """One forward pass.

        Raises:
            ProcessDied: meanwhile; another one is there now.
            ApiError: the model was lost with a process before.
        """
        async with self._replacing:
            lost = key not in self._weights
        if lost:
            raise _model_lost()
        scored: ScoredBatch = await self._call("score", key, texts)
        return scored

    def check(self, keys: Iterable[str]) -> None:
        """See that it has one of these models in memory, as far as that is known without asking it.

        Raises:
            ApiError: it has none, or it is being started again.
        """
        if self._replacing.locked():
            raise ApiError(ErrorType.UNAVAILABLE, "the scoring process is being started again", retry_after_s=1)
        if self._weights.keys().isdisjoint(keys):
            raise _model_lost()

    async def _call(self, method: str, *arguments: Any) -> Any:
        async with self._replacing:
            running = self._running
        try:
            return await getattr(running.host, method).remote(*arguments)
        except _DEATHS as error:
            logger.error("the scoring process died: %s", error)
            await self._replace(running)
            raise ProcessDied("the scoring process died") from error

    async def _replace(self, dead: _Running) -> None:
        """Start another process, with the models that the dead one had. Whoever calls meanwhile waits."""
        async with self._replacing:
            started = dead
            while self._running is dead:
                await asyncio.sleep(self._pause_s())
                started = self._start(started.number + 1)
                try:
                    for weights in list(self._weights.values()):
                        await self._load_again(started, weights)
                except _DEATHS as error:
                    logger.error("the scoring process died of its models: %s", error)
                else:
                    self._running = started

    async def _load_again(self, started: _Running, weights: Weights) -> None:
        try:
            await started.host.load.remote(weights)
        except RayTaskError as error:
            logger.error("a model is lost: %s", error)
            self._weights.pop(weights.key, None)

    def _pause_s(self) -> float:
        """Before the next start: none after the first death, then longer with each one of the last minute."""
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - death < _RECENT_S for death in self._deaths)
        return 0.0 if recent == 1 else min(0.5 * 2.0 ** (recent - 2), _LONGEST_PAUSE_S)

    def _start(self, number: int) -> _Running:
        return _Running(self._make(), number)

    def _make(self) -> Any:
        settings = self._settings
        return (
            ray.remote(self._host)
            # One thread scores, one has the next batch in hand, and one loads a new model meanwhile.
            .options(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                max_concurrency=3,
                runtime_env={"env_vars": environment(settings)},
            )
            .remote(settings)
        )


def _model_lost() -> ApiError:
    return ApiError(ErrorType.UNAVAILABLE, "the model's directory holds other weights by now", retry_after_s=5)
