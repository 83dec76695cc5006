"""Swaps, canaries, shadows, rollbacks, weights written in place, and deaths of everything, in any order.

Monitor, engine, batcher and scorer are the service's own, with a tiny model; only the processes are none: a death is
what Ray reports of one. Whatever happens, an answer names the version that computed it, and a candidate that was
rolled back stays out until its entry is another one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from rlhf_ray.config.serving import (
    BatchingSettings,
    CandidateSettings,
    DriftSettings,
    LimitSettings,
    ServedModelSettings,
    ServedScorerSettings,
)
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.card import directory_version
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.serve.batcher import MicroBatcher
from rlhf_ray.reward.serve.context import REQUEST, RequestContext
from rlhf_ray.reward.serve.engine import RewardEngine
from rlhf_ray.reward.serve.exchange import ScoreInput
from rlhf_ray.reward.serve.following import Follower
from rlhf_ray.reward.serve.monitor import ServiceMonitor
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.orders import Decisions
from rlhf_ray.reward.serve.scorer_process import ScorerHost, ScorerProcess, reward_settings
from rlhf_ray.reward.serve.traffic import Beat
from tests.planting import copied, edit_weights

SCORER = ServedScorerSettings()
TEXTS = [f"The film number {number} was good in every way." for number in range(40)]
FOLDERS = ("a", "b", "c")
FACTORS = st.sampled_from([-2.0, -1.0, 0.5, 1.0, 3.0])


class _Method:
    def __init__(self, host: _Host, name: str) -> None:
        self._host, self._name = host, name

    async def remote(self, *arguments: Any) -> Any:
        if self._host.death is not None:
            raise self._host.death
        try:
            result = getattr(self._host.inside, self._name)(*arguments)
        except Exception as error:
            raise RayTaskError(self._name, str(error), error).as_instanceof_cause() from None  # type: ignore[no-untyped-call]
        await asyncio.sleep(0)
        if self._host.death is not None:
            raise self._host.death
        return result


class _Host:
    """A scoring process in this one."""

    def __init__(self) -> None:
        self.inside = ScorerHost(SCORER)
        self.death: Exception | None = None

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)


class _Process(ScorerProcess):
    def _make(self) -> Any:
        return _Host()

    def _pause_s(self) -> float:
        return 0.0

    def kill(self, out_of_memory: bool) -> None:
        """Ray's own memory monitor reports a death in a word of its own."""
        self._running.host.death = OutOfMemoryError("out of memory") if out_of_memory else ActorDiedError()


class Store:
    def __init__(self) -> None:
        self.content = Decisions().model_dump_json()

    def load(self) -> Decisions:
        return Decisions.model_validate_json(self.content)

    def save(self, decisions: Decisions) -> None:
        self.content = decisions.model_dump_json()


class Replica:
    """What a replica is made of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = _Process(SCORER)
        self.observer = Observer(CandidateSettings(), False)
        self.batcher = MicroBatcher(
            BatchingSettings(wait_ms=0), lambda model, texts: self.process.score(model.key, texts), self.observer.batch
        )
        self.engine = RewardEngine(SCORER, LimitSettings(), self.process, self.batcher, self.observer)
        self.follower = Follower(self.engine)

    def beat(self) -> Beat:
        follower = self.follower
        traffic = self.observer.take()
        return Beat(self.name, follower.followed, follower.models(), follower.failure, 0, 1.0, traffic, b"")


class Histories(RuleBasedStateMachine):
    source: Path
    happened: Counter[str]

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(mkdtemp())
        self.scores: dict[str, np.ndarray] = {}
        self.base: np.ndarray | None = None
        for name in FOLDERS:
            copied(self.source, self.folder / name)
            self.note(name, 1.0)
        self.store = Store()
        self.entries = [self.entry("main", "a")]
        self.configuration = 0
        self.out: dict[str, ServedModelSettings] = {}
        self.replicas: list[Replica] = []
        self.restart_monitor()
        self.run(self.add_replica("r0"))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def note(self, folder: str, factor: float) -> None:
        """Remember what the weights in a folder score: the head is linear."""
        if self.base is None:
            self.base = RewardScorer(reward_settings(SCORER, str(self.source))).score_texts(TEXTS).scores
        self.scores[directory_version(self.folder / folder)] = factor * self.base

    def entry(self, name: str, folder: str, **values: Any) -> ServedModelSettings:
        return ServedModelSettings(name=name, path=str(self.folder / folder), **values)

    def configure(self) -> None:
        self.monitor.configure(self.entries, {"number": self.configuration})

    async def add_replica(self, name: str) -> None:
        replica = Replica(name)
        await replica.follower.begin(self.monitor.order)
        self.replicas.append(replica)

    @rule(folder=st.sampled_from(FOLDERS), factor=FACTORS)
    def write_weights(self, folder: str, factor: float) -> None:
        target = self.folder / folder
        shutil.copyfile(self.source / "model.safetensors", target / "model.safetensors")
        edit_weights(target, lambda weights: {**weights, "score.weight": weights["score.weight"] * factor})
        self.note(folder, factor)

    @rule(
        main=st.sampled_from(FOLDERS),
        canary=st.sampled_from((None, *FOLDERS)),
        shadow=st.sampled_from((None, *FOLDERS)),
        by_command=st.booleans(),
    )
    def order(self, main: str, canary: str | None, shadow: str | None, by_command: bool) -> None:
        entries = [self.entry("main", main)]
        entries += [self.entry("canary", canary, share=0.4)] if canary else []
        entries += [self.entry("shadow", shadow, shadow=True)] if shadow else []
        self.out = {name: entry for name, entry in self.out.items() if entry in entries}
        self.entries = entries
        if by_command:
            self.monitor.order_models(entries)
        else:
            self.configuration += 1
            self.configure()

    @rule()
    def restart_monitor(self) -> None:
        self.monitor = ServiceMonitor(CandidateSettings(min_texts=30), DriftSettings(), self.store)
        self.configure()

    @rule(number=st.integers(0, 1), out_of_memory=st.booleans())
    def kill_process(self, number: int, out_of_memory: bool) -> None:
        self.replicas[number % len(self.replicas)].process.kill(out_of_memory)

    @rule(number=st.integers(0, 1))
    def replace_replica(self, number: int) -> None:
        if len(self.replicas) > 1:
            dead = self.replicas.pop(number % len(self.replicas))
            self.run(dead.batcher.close())
        self.run(self.add_replica(f"r{number}-{len(self.scores)}"))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3]))
    def time_passes(self, seconds: float) -> None:
        async def beats() -> None:
            for replica in self.replicas:
                replica.follower.told(self.monitor.beat(replica.beat()))
            await asyncio.sleep(seconds)

        self.run(beats())

    @rule(
        number=st.integers(0, 1),
        asked=st.sampled_from([None, "main", "canary", "shadow"]),
        dies_after=st.sampled_from([None, None, 0, 3, 30]),
    )
    def score(self, number: int, asked: str | None, dies_after: int | None) -> None:
        """Forty requests; the process may die under them, after so many turns of the event loop."""
        replica = self.replicas[number % len(self.replicas)]

        async def requests() -> list[Any]:
            async def one(place: int) -> Any:
                REQUEST.set(RequestContext(f"{len(self.scores)}-{place}", "own"))
                return await replica.engine.score([ScoreInput(text=TEXTS[place])], model=asked, sticky=str(place))

            under_way = [asyncio.ensure_future(one(place)) for place in range(len(TEXTS))]
            if dies_after is not None:
                for _ in range(dies_after):
                    await asyncio.sleep(0)
                replica.process.kill(False)
                self.happened["death under requests"] += not all(each.done() for each in under_way)
            return await asyncio.gather(*under_way, return_exceptions=True)

        for place, answer in enumerate(self.run(requests())):
            if isinstance(answer, ApiError):
                # A name that the replica has not (yet), a model that was lost with its process, or a text under which
                # two processes died, the second time alone.
                allowed = {ErrorType.NOT_FOUND, ErrorType.UNAVAILABLE}
                assert answer.type in (allowed if dies_after is None else allowed | {ErrorType.UNSCORABLE}), answer
                self.happened[answer.type] += 1
                continue
            assert not isinstance(answer, BaseException), answer
            assert answer.scores[0].score == pytest.approx(self.scores[answer.model.version][place], abs=1e-5)
            self.happened[f"answered by {answer.model.name}"] += 1

    @rule(folder=st.sampled_from(FOLDERS), factor=st.sampled_from([-2.0, -1.0]), shadow=st.booleans())
    def candidate_that_is_bad(self, folder: str, factor: float, shadow: bool) -> None:
        """It gets traffic until the monitor has made up its mind."""
        main = self.entries[0]
        if main.path == str(self.folder / folder):
            return
        self.write_weights(folder, factor)
        self.order(Path(main.path).name, None if shadow else folder, folder if shadow else None, True)
        for _ in range(4):
            self.time_passes(0.05)
            self.score(0, None, None)
            self.score(1, "shadow" if shadow else None, None)
        self.time_passes(0.0)

    @invariant()
    def what_was_rolled_back_stays_out(self) -> None:
        if not hasattr(self, "monitor"):
            return
        ordered = {model.name for model in self.monitor.order.models}
        rolled_back = {entry.name: entry for entry in self.entries if entry.name not in ordered}
        self.happened.update(f"{name} rolled back" for name in rolled_back.keys() - self.out.keys())
        self.out |= rolled_back
        assert not self.out.keys() & ordered
        assert "main" in ordered
        for replica in self.replicas:
            if replica.follower.followed == self.monitor.order.number:
                assert {model.info.name for model in replica.engine.table.models} == ordered
                # Nothing is held that no entry needs.
                assert replica.process._weights.keys() <= {model.key for model in replica.engine.table.models}

    async def end(self) -> None:
        for replica in self.replicas:
            await replica.batcher.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.end())
            self.loop.close()
            shutil.rmtree(self.folder)


def test_every_answer_names_the_version_that_computed_it_whatever_happened_before(tiny: Path):
    happened: Counter[str] = Counter()
    kind = type("TinyHistories", (Histories,), {"source": tiny / "reward_model", "happened": happened})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        kind, settings=settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
    )
    # Nothing is proven by histories in which nothing happens.
    assert happened["answered by main"] > 2000, happened
    for kind_of_event in ("answered by canary", "answered by shadow"):
        assert happened[kind_of_event] > 100, happened
    for kind_of_event in ("canary rolled back", "shadow rolled back", "death under requests"):
        assert happened[kind_of_event] > 2, happened
