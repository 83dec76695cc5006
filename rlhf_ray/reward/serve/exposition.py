"""Metrics for Prometheus: those of the service as a whole, and those of several replicas as one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_DRIFT = {
    "ks": "Kolmogorov-Smirnov distance of the last texts from the reference.",
    "p_value": "Chance of that distance, or a larger one, where nothing has changed.",
    "alarm": "1 where the last whole window differs from the reference.",
}
_CANDIDATES = {
    "texts": "Texts that the candidate and the live model are compared on.",
    "sign_flip_rate": "Share of pairs of texts that a shadow orders the other way.",
    "kendall_tau": "Rank correlation of a shadow's scores with the live model's.",
    "score_shift": "Difference of the mean scores, in standard deviations of the live scores.",
    "latency_ratio": "Time for a batch, as a multiple of the live model's.",
    "failure_rate": "Share of texts without a finite score.",
}


class StatusMetrics(Collector):
    """What the monitor alone knows: models, drift, candidates.

    Args:
        status: as `/v1/service` answers it.
    """

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """All families, also those without a sample."""
        status = self._status
        states = [_state(replica, status["order"]) for replica in status["replicas"]]
        replicas = [{"state": name, "number": states.count(name)} for name in ("following", "loading", "failing")]
        text = "Replicas by what became of the last order of models."
        yield _gauge("rlhf_ray_replicas", text, ("state",), replicas, "number")
        models = [{**row, "model": row["name"], "state": row["role"], "is": 1} for row in status["models"]]
        states_of_models = ("model", "version", "state")
        text = "1 for the state of each model: live, shadow, loading, failed or rolled_back."
        yield _gauge("rlhf_ray_model_state", text, states_of_models, models, "is")
        text = "Share of the requests that name no model."
        yield _gauge("rlhf_ray_model_share", text, ("model", "version"), models, "share")
        for name, text in _DRIFT.items():
            yield _gauge(f"rlhf_ray_drift_{name}", text, ("model", "version", "quantity"), status["drift"], name)
        alarms = CounterMetricFamily("rlhf_ray_drift_alarms", "Windows that differed.", labels=("model", "version"))
        for row in status["drift"]:
            if row["quantity"] == "score":  # both rows have the same number
                alarms.add_metric((row["model"], row["version"]), row["alarms"])
        yield alarms
        candidates = [{**row, "model": row["name"]} for row in status["candidates"]]
        for name, text in _CANDIDATES.items():
            yield _gauge(f"rlhf_ray_candidate_{name}", text, ("model", "version", "role"), candidates, name)


def status_exposition(status: Mapping[str, Any]) -> bytes:
    """The metrics of the service as a whole in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(StatusMetrics(status))
    return generate_latest(registry)


def _state(replica: Mapping[str, Any], order: int) -> str:
    if replica["load_failure"] is not None:
        return "failing"
    return "following" if replica["order"] == order else "loading"


def _gauge(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[Mapping[str, Any]], value: str
) -> GaugeMetricFamily:
    """A sample for each row that has a value; the last one of those with the same labels, as while two main models of
    different replicas are compared with one candidate."""
    samples = {tuple(row[label] or "" for label in labels): row[value] for row in rows if row[value] is not None}
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, sample in samples.items():
        family.add_metric(values, sample)
    return family


class _Merged(Collector):
    """Families of several expositions, each once, every sample with its replica."""

    def __init__(self, expositions: Mapping[str, bytes]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, exposition in self._expositions.items():
            for family in text_string_to_metric_families(exposition.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        return families.values()


def merge_expositions(expositions: Mapping[str, bytes]) -> bytes:
    """One text of several; samples get the label `replica`.

    Args:
        expositions: Prometheus' text format, by replica.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(expositions))
    return generate_latest(registry)
