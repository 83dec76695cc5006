"""Dashboard and alerts in cluster/monitoring name metrics and labels that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from rlhf_ray.config.serving import CandidateSettings, DriftSettings
from rlhf_ray.reward.client.service_errors import ErrorType
from rlhf_ray.reward.serve.exposition import StatusMetrics
from rlhf_ray.reward.serve.monitor import ServiceMonitor
from rlhf_ray.reward.serve.observations import ServiceMetrics
from rlhf_ray.reward.serve.wire import family_of
from tests.unit.test_reward_serve_monitor import Kept

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
ROWS = [
    "Traffic and latency by protocol",
    "Refusals by type",
    "Callers",
    "Queue and batches",
    "Score distribution and drift",
    "Candidates",
    "Versions",
    "Memory",
]
ALERTS = {
    "RewardServiceErrors", "RewardServiceSlow", "RewardServiceNotReady", "RewardScorerRestarts", "RewardDrift",
    "RewardCandidateRolledBack", "RewardAuditIncomplete", "RewardConfigurationBroken", "RewardMonitorSilent",
    "RewardTokenFileBroken",
}  # fmt: skip


def declared() -> set[str]:
    """The names of all metrics of a replica, the monitor and Ray's nodes, as Prometheus stores them."""
    status = ServiceMonitor(CandidateSettings(), DriftSettings(), Kept()).status()
    families: Iterable[Metric] = [*ServiceMetrics().registry.collect(), *StatusMetrics(status).collect()]
    own = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}
    return own | {f"ray_{name}" for name in METRICS_GAUGES}


def metric_names(expression: str) -> set[str]:
    """The metrics of a PromQL expression: names that are no label, function, operator or number."""
    without_matchers = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    without_labels = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", without_matchers)
    names = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", without_labels)
    return set(names) - {"and", "or", "unless", "bool", "offset"}


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return content


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
    for panel in dashboard()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        (
            'sum by (le) (rate(a_bucket{x=~"b|c"}[5m])) / on () group_left () sum(c_total) > 0.05',
            {"a_bucket", "c_total"},
        ),
        ("absent(a) and on () max by (d) (b) == 1", {"a", "b"}),
        ("(sum(a) or vector(0)) == 0", {"a"}),
    ],
)
def test_metrics_of_an_expression_are_found(expression, names):
    assert metric_names(expression) == names


def test_every_metric_that_is_named_is_exported():
    there = declared()
    assert len(there) > 40
    unknown = {(where, name) for where, expr in expressions() for name in metric_names(expr) - there}
    assert not unknown
    named = {name for _, expr in expressions() for name in metric_names(expr)}
    own = {name for name in there if name.startswith("rlhf_ray_")}
    # Whoever adds a metric says where an operator sees it.
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in own - named} <= {
        re.sub("_(sum|count|bucket)$", "", name) for name in named
    }


def test_error_types_and_protocols_in_the_matchers_exist():
    for where, expr in expressions():
        for kind in re.findall(r'type=~"([^"]*)"', expr):
            assert set(kind.split("|")) <= {each.value for each in ErrorType}, where
        for families in re.findall(r'family!~"([^"]*)"', expr):
            known = {family_of(path) for path in ("/metrics", "/", "/nowhere", "/v1/explain")}
            assert set(families.split("|")) <= known, where


def test_every_alert_says_what_it_is_about_and_how_grave():
    assert {rule["alert"] for rule in rules()} == ALERTS
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_dashboard_has_its_rows_and_no_panel_covers_another():
    panels = dashboard()["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == ROWS
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) == 23


def test_prometheus_takes_one_target_and_the_rules():
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    assert [(FOLDER / name).is_file() for name in config["rule_files"]] == [True]
    [service] = [job for job in config["scrape_configs"] if job["job_name"] == "reward-service"]
    [group] = service["static_configs"]
    assert len(group["targets"]) == 1, "every replica answers with the metrics of all: more would count them twice"
