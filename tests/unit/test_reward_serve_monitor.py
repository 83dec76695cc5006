"""What the service as a whole knows, and which models it orders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlhf_ray.config.serving import CandidateSettings, DriftSettings, ServedModelSettings
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.reference_scores import ReferenceScores
from rlhf_ray.reward.serve.application import Monitor
from rlhf_ray.reward.serve.exchange import ModelId, ModelInfo
from rlhf_ray.reward.serve.exposition import merge_expositions
from rlhf_ray.reward.serve.monitor import ServiceMonitor
from rlhf_ray.reward.serve.orders import Decisions
from rlhf_ray.reward.serve.timeline import Timeline, quantile_ms
from rlhf_ray.reward.serve.traffic import (
    LATENCY_EDGES_S,
    Beat,
    ModelOrder,
    ModelWork,
    Pace,
    ReplicaModel,
    ShadowSample,
    TextSample,
    Traffic,
)

MAIN = ServedModelSettings(name="main", path="/main")
NEXT = ServedModelSettings(name="next", path="/next", shadow=True)
CANARY = ServedModelSettings(name="canary", path="/canary", share=0.2)
FAILING = {
    ModelId("main", "main-v"): ModelWork(texts=200, tokens=1),
    ModelId("canary", "canary-v"): ModelWork(texts=200, tokens=1, failures=50),
}
SCORES = keyed_generator(0, "monitor").normal(size=4000)
LENGTHS = keyed_generator(1, "monitor").integers(5, 60, size=4000)


MAIN_ID, NEXT_ID, CANARY_ID = (ModelId(name, f"{name}-v") for name in ("main", "next", "canary"))


class Kept:
    """A store that outlives monitors."""

    def __init__(self) -> None:
        self.decisions = Decisions()

    def load(self) -> Decisions:
        return Decisions.model_validate_json(self.decisions.model_dump_json())

    def save(self, decisions: Decisions) -> None:
        self.decisions = decisions


def held(
    settings: ServedModelSettings, share: float, reference: bool = False, version: str | None = None
) -> ReplicaModel:
    version = version or f"{settings.name}-v"
    role: Any = "shadow" if settings.shadow else "live"
    info = ModelInfo(settings.name, version, 1.0, ("preference",), 1, 64, "float32", role, share)
    scores = ReferenceScores.of(SCORES, LENGTHS, version) if reference else None
    return ReplicaModel(info, settings.path, scores, None if share > 0.5 else Pace(1.0, 1.0, 10))


def beat(order: ModelOrder, models: tuple[ReplicaModel, ...], replica: str = "a", **traffic: Any) -> Beat:
    return Beat(replica, order.number, models, None, 3, 1.0, Traffic(**traffic), b"")


def monitor(*models: ServedModelSettings, store: Kept | None = None, **candidates: Any) -> ServiceMonitor:
    made = ServiceMonitor(
        CandidateSettings(min_texts=50, **candidates), DriftSettings(window_texts=500, min_texts=100), store or Kept()
    )
    made.configure(models, {"models": [model.model_dump() for model in models]})
    return made


def shadow_traffic(factor: float, count: int = 300) -> dict[str, Any]:
    live = SCORES[:count]
    sample = ShadowSample(live, live * factor, np.arange(count).astype(np.uint64))
    return {
        "shadows": {(MAIN_ID, NEXT_ID): sample},
        "work": {MAIN_ID: ModelWork(texts=count, tokens=1), NEXT_ID: ModelWork(texts=count, tokens=1)},
    }


def test_a_shadow_that_agrees_stays_and_one_that_does_not_leaves_the_order():
    for factor, stays in ((1.5, True), (-1.0, False)):
        service = monitor(MAIN, NEXT)
        models = (held(MAIN, 1.0), held(NEXT, 0.0))
        order = service.beat(beat(service.order, models, **shadow_traffic(factor)))
        assert (NEXT in order.models) == stays
        [row] = [row for row in service.status()["models"] if row["name"] == "next"]
        assert (row["role"] == "rolled_back") == (not stays)
        assert ("sign flips" in (row["reason"] or "")) == (not stays)


def test_a_candidate_taken_back_returns_only_as_another_entry():
    service = monitor(MAIN, NEXT)
    models = (held(MAIN, 1.0), held(NEXT, 0.0))
    service.beat(beat(service.order, models, **shadow_traffic(-1.0)))
    service.order_models((MAIN, NEXT))
    assert NEXT not in service.order.models
    service.order_models((MAIN.model_copy(update={"path": "/newer"}), NEXT))
    assert NEXT not in service.order.models
    other = NEXT.model_copy(update={"path": "/other"})
    service.order_models((MAIN, other))
    assert other in service.order.models


def test_an_order_of_the_same_entries_is_another_order():
    service = monitor(MAIN)
    before = service.order.number
    service.order_models((MAIN,))
    assert service.order.models == (MAIN,)
    assert service.order.number > before


def test_a_canary_that_fails_gives_its_share_back():
    service = monitor(MAIN, CANARY)
    models = (held(MAIN, 0.8), held(CANARY, 0.2))
    order = service.beat(beat(service.order, models, work=FAILING))
    assert [(model.name, model.share) for model in order.models] == [("main", 1.0)]


def test_a_canary_that_fails_is_rolled_back_after_the_main_model_was_exchanged():
    service = monitor(MAIN, CANARY)
    canary = held(CANARY, 0.2)
    service.beat(beat(service.order, (held(MAIN, 0.8), canary), work={MAIN_ID: ModelWork(texts=10)}))
    newer = MAIN.model_copy(update={"path": "/newer"})
    service.order_models((newer, CANARY))
    models = (held(newer, 0.8, version="newer-v"), canary)
    work = {ModelId("main", "newer-v"): ModelWork(texts=200), CANARY_ID: ModelWork(texts=200, failures=50)}
    order = service.beat(beat(service.order, models, work=work))
    assert [model.name for model in order.models] == ["main"]
    assert [row["version"] for row in service.status()["models"]] == ["newer-v", "canary-v"]


def test_what_an_earlier_order_did_says_nothing_of_this_one():
    service = monitor(MAIN, CANARY)
    earlier, models = service.order, (held(MAIN, 0.8), held(CANARY, 0.2))
    service.order_models((MAIN, CANARY.model_copy(update={"path": "/mended"})))
    service.beat(beat(earlier, models, work=FAILING))
    assert len(service.order.models) == 2


def test_entries_with_equal_weights_are_counted_apart():
    service = monitor(MAIN, CANARY)
    models = (held(MAIN, 0.8, version="v"), held(CANARY, 0.2, version="v"))
    work = {ModelId("main", "v"): ModelWork(texts=90), ModelId("canary", "v"): ModelWork(texts=60, failures=30)}
    service.beat(beat(service.order, models, work=work))
    assert [(row["name"], row["texts"]) for row in service.status()["models"]] == [("main", 90), ("canary", 60)]
    assert [model.name for model in service.order.models] == ["main"]


def test_a_monitor_that_began_anew_knows_what_was_decided():
    store = Kept()
    service = monitor(MAIN, NEXT, CANARY, store=store)
    models = (held(MAIN, 0.8), held(NEXT, 0.0), held(CANARY, 0.2))
    service.beat(beat(service.order, models, **shadow_traffic(-1.0)))
    newer = MAIN.model_copy(update={"path": "/newer"})
    service.order_models((newer, NEXT, CANARY))
    restarted = monitor(MAIN, NEXT, CANARY, store=store)
    assert restarted.order == service.order
    assert [model.path for model in restarted.order.models] == ["/newer", "/canary"]
    # A deployment's other configuration is a newer word than an order of the one before; what was rolled back stays.
    assert monitor(MAIN, NEXT, store=store).order.models == (MAIN.model_copy(update={"share": 1.0}),)


def test_models_that_left_are_forgotten():
    service = monitor(MAIN, NEXT)
    for number in range(20):
        models = (held(MAIN, 1.0, version=f"v{number}"), held(NEXT, 0.0))
        service.order_models((MAIN, NEXT))
        service.beat(beat(service.order, models))
    assert len(service._known) == 2
    assert len(service.status()["candidates"]) == 1


def test_why_an_order_cannot_be_followed_shows_as_long_as_it_stands():
    service = monitor(MAIN)
    failed = replace(beat(service.order, (held(MAIN, 1.0),)), order=0, load_failure=(service.order.number, "broken"))
    service.beat(failed)
    [row], [replica] = service.status()["models"], service.status()["replicas"]
    assert (row["role"], row["reason"], replica["load_failure"]) == ("failed", "broken", "broken")
    service.order_models((MAIN,))
    assert service.status()["replicas"][0]["load_failure"] is None


def test_a_replica_with_other_models_shows():
    service = monitor(MAIN)
    behind = ModelOrder((NEXT,), 0)
    service.beat(beat(behind, (held(MAIN, 1.0),)))
    assert service.status()["models"][0]["role"] == "loading"
    service.beat(beat(service.order, (held(MAIN, 1.0),)))
    assert service.status()["models"][0]["role"] == "live"


@pytest.mark.parametrize(("shift", "alarm"), [(0.0, False), (1.0, True)])
def test_drift_is_seen_against_the_models_own_reference(shift, alarm):
    service = monitor(MAIN)
    scores = SCORES[::4] + shift
    sample = TextSample(scores, LENGTHS[::4], np.arange(len(scores)).astype(np.uint64))
    service.beat(beat(service.order, (held(MAIN, 1.0, reference=True),), samples={MAIN_ID: sample}))
    score, length = service.status()["drift"]
    assert (score["alarm"], length["alarm"], score["windows"]) == (alarm, False, 2)
    assert sum(score["histogram"]["live"]) == pytest.approx(1)
    assert sum(score["histogram"]["reference"]) == pytest.approx(1, abs=0.02)


def test_what_the_page_reads_is_there():
    service = monitor(MAIN, NEXT)
    models = (held(MAIN, 1.0), held(NEXT, 0.0))
    service.beat(beat(service.order, models, **shadow_traffic(1.0), outcomes={"answered": 4}, errors={"deadline": 2}))
    status = service.status()
    assert status["errors"] == {"deadline": 2}
    assert status["replicas"][0]["queued"] == 3
    shadow = status["candidates"][0]
    assert {"sign_flip_rate", "kendall_tau", "score_shift", "latency_ratio", "failure_rate"} <= shadow.keys()


def test_the_timeline_counts_in_steps():
    timeline = Timeline()
    latencies = np.zeros(len(LATENCY_EDGES_S) + 1, np.int64)
    latencies[[10, 30]] = (98, 2)
    timeline.add(100.0, "a", Traffic(outcomes={"answered": 6, "refused": 2}, texts=8, latencies=latencies), 3)
    timeline.add(101.0, "b", Traffic(outcomes={"answered": 4}), 5)
    series = timeline.series(104.5)
    assert series["time"] == [100.0, 102.0]
    assert (series["requests_per_s"], series["refused_per_s"], series["queued"]) == ([5.0, 0.0], [1.0, 0.0], [8.0, 0.0])
    assert series["latency_p50_ms"] == [pytest.approx(LATENCY_EDGES_S[10] * 1000), None]
    assert quantile_ms(latencies, 0.99) == pytest.approx(LATENCY_EDGES_S[30] * 1000)


def test_what_only_the_monitor_knows_is_in_the_metrics():
    service = monitor(MAIN, NEXT)
    models = (held(MAIN, 1.0, reference=True), held(NEXT, 0.0))
    scores = SCORES[::4] + 1.0
    sample = TextSample(scores, LENGTHS[::4], np.arange(len(scores)).astype(np.uint64))
    service.beat(beat(service.order, models, samples={MAIN_ID: sample}, **shadow_traffic(-1.0)))
    failed = beat(service.order, models, replica="b")
    service.beat(replace(failed, order=0, load_failure=(service.order.number, "no such directory")))
    exposed = service.expositions()
    assert exposed.keys() == {"a", "b", "monitor"}
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(exposed["monitor"].decode())
        for sample in family.samples
    }
    assert found["rlhf_ray_replicas", "failing"] == 1
    assert found["rlhf_ray_model_state", "next", "next-v", "rolled_back"] == 1
    assert found["rlhf_ray_model_share", "main", "main-v"] == 1
    assert found["rlhf_ray_drift_alarm", "main", "main-v", "score"] == 1
    assert found["rlhf_ray_drift_alarm", "length", "main", "main-v"] == 0
    assert found["rlhf_ray_drift_alarms_total", "main", "main-v"] == 2
    assert found["rlhf_ray_candidate_sign_flip_rate", "next", "next-v", "shadow"] == 1


def test_a_candidate_beside_two_main_models_is_one_sample():
    service = monitor(MAIN, NEXT)
    before = service.order
    service.beat(beat(before, (held(MAIN, 1.0), held(NEXT, 0.0))))
    service.order_models((MAIN, NEXT))
    service.beat(beat(service.order, (held(MAIN, 1.0, version="newer"), held(NEXT, 0.0)), replica="b"))
    assert len(service.status()["candidates"]) == 2
    assert service.expositions()["monitor"].decode().count("rlhf_ray_candidate_texts{") == 1


def test_metrics_of_replicas_are_one_text_with_a_label():
    text = b'# HELP x Words.\n# TYPE x counter\nx_total{a="b"} 2.0\n'
    merged = merge_expositions({"one": text, "two": text}).decode()
    assert merged.count("# TYPE x_total counter") == 1
    assert 'x_total{a="b",replica="one"} 2.0' in merged
    assert 'x_total{a="b",replica="two"} 2.0' in merged


def test_models_that_cannot_share_the_traffic_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """A wrong line in a file that is applied to a running service must not stop it."""
    made = object.__new__(Monitor)
    made._monitor = monitor(MAIN)
    before = made._monitor.order
    for wrong in ([NEXT], [MAIN, MAIN.model_copy(update={"share": 0.5})]):
        made.reconfigure({"models": [entry.model_dump() for entry in wrong]})
        assert made._monitor.order == before
        assert "refused" in made._monitor.status()["events"][-1]["what"]
    made.reconfigure({"models": [MAIN.model_dump(), NEXT.model_dump()]})
    assert [entry.name for entry in made._monitor.order.models] == ["main", "next"]
    made._monitor = ServiceMonitor(CandidateSettings(), DriftSettings(), Kept())
    with pytest.raises(ValueError, match="all are shadows"):
        made.reconfigure({"models": [NEXT.model_dump()]})
