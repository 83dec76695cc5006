"""Metrics of several replicas as one answer to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


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
