"""Orders that cannot be followed yet, beats that fail, processes that die again and again, and Serve's own queue."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_ray.config.serving import LimitSettings, ServedModelSettings, ServedScorerSettings, ServiceSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.serve import application, following
from rlhf_ray.reward.serve.application import Replica
from rlhf_ray.reward.serve.following import Follower
from rlhf_ray.reward.serve.model_table import Weights
from rlhf_ray.reward.serve.scorer_process import ScorerProcess
from rlhf_ray.reward.serve.traffic import ModelOrder


class Engine:
    """Loads nothing, and cannot before it is told so."""

    def __init__(self) -> None:
        self.can, self.tries = True, 0

    async def load(self, models: Sequence[ServedModelSettings]) -> None:
        self.tries += 1
        if not self.can:
            raise BadInput("models.main.path", "half written", "a reward model")


def order(number: int) -> ModelOrder:
    return ModelOrder((ServedModelSettings(name="main", path="somewhere"),), number)


def test_a_load_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "_FIRST_PATIENCE_S", 0.05)
    monkeypatch.setattr(following, "_TICK_S", 0.005)

    async def main() -> None:
        engine = Engine()
        follower = Follower(cast(Any, engine))
        await follower.begin(order(1))
        engine.can = False
        while engine.tries < 4:
            follower.told(order(2))  # a beat
            await asyncio.sleep(0.01)
        assert follower.failure is not None
        assert (follower.failure[0], follower.followed) == (2, 1)
        assert "half written" in follower.failure[1]
        engine.can = True
        while not follower.is_up_to_date:
            follower.told(order(2))
            await asyncio.sleep(0.01)
        assert (follower.failure, follower.followed) == (None, 2)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_beat_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(application, "BEAT_S", 0.001)
    told = asyncio.Event()
    outcomes = iter([ValueError("a metric cannot be computed"), RuntimeError("the monitor is gone")])

    def report() -> Any:
        if (error := next(outcomes, None)) is not None:
            raise error
        return "beat"

    async def beat(_: str) -> ModelOrder:
        return order(7)

    async def main() -> None:
        replica = SimpleNamespace(_report=report, _monitor=monitor, _follower=follower)
        beats = asyncio.create_task(Replica._beat(cast(Replica, replica)))
        await told.wait()
        beats.cancel()

    monitor = SimpleNamespace(beat=SimpleNamespace(remote=beat))
    follower = SimpleNamespace(told=lambda _: told.set())
    asyncio.run(asyncio.wait_for(main(), 30))


class Process(ScorerProcess):
    """Whose process is a record of what it was told."""

    def _make(self) -> Any:
        self.told: list[tuple[str, Any]] = []

        def method(name: str) -> Any:
            async def call(*arguments: Any) -> None:
                self.told.append((name, arguments))
                if name == "load":
                    await asyncio.sleep(60)

            return SimpleNamespace(remote=call)

        return SimpleNamespace(load=method("load"), keep_only=method("keep_only"))


def test_a_process_that_dies_again_and_again_is_started_after_longer_and_longer_pauses():
    process = Process(ServedScorerSettings())
    pauses = [process._pause_s() for _ in range(12)]
    assert pauses[:4] == [0.0, 0.5, 1.0, 2.0]
    assert pauses[-1] == 30.0


def test_a_model_whose_load_was_given_up_is_let_go():
    async def main() -> None:
        process = Process(ServedScorerSettings())
        load = asyncio.ensure_future(process.load(Weights("folder", "version", ())))
        while not process.told:
            await asyncio.sleep(0)
        load.cancel()
        await process.keep_only(["other"])
        assert process.told[-1] == ("keep_only", (["other"],))

    asyncio.run(asyncio.wait_for(main(), 30))


def test_serves_own_queue_has_an_end_too_and_lies_behind_ours():
    service = ServiceSettings(limits=LimitSettings(max_queued_requests=7))
    replica = application.application(service, ())._bound_deployment
    assert replica._deployment_config.max_queued_requests == 7
    assert 7 < replica.max_ongoing_requests < 200
