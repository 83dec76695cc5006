"""The process beside a replica in which its models compute.

A forward pass of short texts is thousands of small steps that each need Python's interpreter lock, and so does every
request that comes in: in one process they take turns, and a third of the throughput is gone. Apart, they share
nothing but a batch's token ids and its scores. And what can kill a model (memory, a kernel) leaves the replica alive:
it starts the process again, and those who wait get their scores a little later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from rlhf_ray.config.serving import ServedScorerSettings
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.models.reward_texts import Encoded
from rlhf_ray.roles.reward_scorer import RewardScorer
from rlhf_ray.runtime.actor_group import environment
from rlhf_ray.serving.batcher import ScoredBatch

_NICENESS = 10

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

    def load(self, key: str, path: str) -> None:
        """Bring a model into memory, if it is not there.

        Raises:
            BadInput: its weights cannot be used.
        """
        if key not in self._scorers:
            self._scorers[key] = RewardScorer(reward_settings(self._settings, path))

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
    """

    def __init__(self, settings: ServedScorerSettings) -> None:
        self._settings = settings
        self._paths: dict[str, str] = {}
        self._restarting = asyncio.Lock()
        self._running = self._start(0)

    @property
    def restarts(self) -> int:
        """How often it died."""
        return self._running.number

    async def load(self, key: str, path: str) -> None:
        """Bring a model into the process's memory.

        Raises:
            ray.exceptions.RayTaskError: as the `BadInput` that says why it cannot be used.
        """
        await self._call("load", key, path)
        self._paths[key] = path

    async def keep_only(self, keys: Sequence[str]) -> None:
        """Let go of all other models."""
        self._paths = {key: path for key, path in self._paths.items() if key in keys}
        await self._call("keep_only", list(keys))

    async def score(self, key: str, texts: Sequence[Encoded]) -> ScoredBatch:
        """One forward pass; where the process dies of it, one more in a new one."""
        scored: ScoredBatch = await self._call("score", key, texts)
        return scored

    async def _call(self, method: str, *arguments: Any) -> Any:
        running = self._running
        try:
            return await getattr(running.host, method).remote(*arguments)
        except RayActorError as error:
            logger.error("the scoring process died: %s", error)
            await self._replace(running)
            return await getattr(self._running.host, method).remote(*arguments)

    async def _replace(self, dead: _Running) -> None:
        async with self._restarting:
            if self._running is not dead:
                return
            started = self._start(dead.number + 1)
            for key, path in self._paths.items():
                await started.host.load.remote(key, path)
            # Not before its models are in memory: a batch that comes meanwhile finds the dead one, and waits here too.
            self._running = started

    def _start(self, number: int) -> _Running:
        settings = self._settings
        host = (
            ray.remote(ScorerHost)
            # One thread scores, one has the next batch in hand, and one loads a new model meanwhile.
            .options(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                max_concurrency=3,
                runtime_env={"env_vars": environment(settings)},
            )
            .remote(settings)
        )
        return _Running(host, number)
