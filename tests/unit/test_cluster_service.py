"""The RayService in cluster/ is the service of the project's own configuration, with probes, token and GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rlhf_ray.config.load import load_config
from rlhf_ray.config.serving import ServedModelSettings, ServiceSettings, ServingConfig
from rlhf_ray.reward.serve.application import build
from rlhf_ray.reward.serve.auth import read_token
from rlhf_ray.reward.serve.deploy import absolute_models, absolute_service
from rlhf_ray.reward.serve.front import OPEN_PATHS
from tests.unit.test_cluster_files import ROOT, documents, ray_spec

TOKEN_FILE = "/etc/reward-service/token"
OVERRIDES = [f"endpoint.token_file={TOKEN_FILE}", "models.preference.path=/shared/models/preference-1"]


def only(kind: str) -> dict[str, Any]:
    [found] = [document for document in documents() if document["kind"] == kind]
    return found


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(only("RayService")["spec"]["serveConfigV2"])
    return config


def worker_group() -> dict[str, Any]:
    [group] = ray_spec(only("RayService"))["workerGroupSpecs"]
    return dict(group)


def containers(template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The container that gets HAProxy ready, and Ray's."""
    [first], [second] = template["spec"]["initContainers"], template["spec"]["containers"]
    return first, second


def test_serve_takes_the_configuration_and_builds_the_application_of_the_projects_own():
    schema = ServeDeploySchema.model_validate(serve_config())
    [application] = schema.applications
    config = load_config(ServingConfig, ROOT / "configs/serve/gpu-replicas.yaml", OVERRIDES)
    service = ServiceSettings.model_validate(application.args["service"])
    # Where the audit log would be is the command's to say, and it is off.
    plain = absolute_service(config).model_copy(update={"audit": service.audit})
    assert not service.audit.enabled
    assert service == plain
    [monitor] = application.deployments
    models = tuple(ServedModelSettings.model_validate(model) for model in monitor.user_config["models"])
    assert models == absolute_models(config)
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    replica = build(application.args)._bound_deployment
    assert (replica.name, replica.init_args[1]._bound_deployment.name) == ("replica", monitor.name)
    assert (schema.http_options.host, schema.http_options.port) == (service.endpoint.host, service.endpoint.port)


def test_the_token_is_a_secret_in_a_file_of_the_replicas_and_the_scrape_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = ServiceSettings.model_validate(serve_config()["applications"][0]["args"]["service"])
    template = worker_group()["template"]
    [secret] = [volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume]
    _, container = containers(template)
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == "token"]
    assert mount["readOnly"]
    assert Path(str(service.endpoint.token_file)).parent == Path(mount["mountPath"])
    credentials = only("ScrapeConfig")["spec"]["authorization"]["credentials"]
    assert credentials == {"name": secret, "key": Path(str(service.endpoint.token_file)).name}
    # As `openssl rand -hex 24` makes it.
    (tmp_path / "token").write_text("0123456789abcdef" * 3)
    monkeypatch.delenv("RLHF_RAY_TOKEN", raising=False)
    there = service.endpoint.model_copy(update={"token_file": str(tmp_path / "token")})
    assert read_token(there) == "0123456789abcdef" * 3
    assert "RLHF_RAY_TOKEN" not in {each["name"] for each in container["env"]}


def test_pods_are_ready_when_the_service_is_and_one_of_them_may_go():
    group = worker_group()
    _, container = containers(group["template"])
    probe, [port] = container["readinessProbe"], container["ports"]
    assert probe["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert probe["httpGet"]["path"] in OPEN_PATHS, "a probe brings no token"
    assert port["containerPort"] == serve_config()["http_options"]["port"]
    assert "livenessProbe" not in container
    budget = only("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"] == group["template"]["metadata"]["labels"]


def test_every_replica_finds_a_pod_and_every_pod_the_proxy():
    service = ServiceSettings.model_validate(serve_config()["applications"][0]["args"]["service"])
    group, spec = worker_group(), ray_spec(only("RayService"))
    assert (group["minReplicas"], group["maxReplicas"]) == (service.scaling.min_replicas, service.scaling.max_replicas)
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["authOptions"] == {"mode": "token"}
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        first, container = containers(template)
        assert container["resources"]["limits"] == container["resources"]["requests"]
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert first["command"] == [
            "python",
            "-m",
            "rlhf_ray.reward.serve.haproxy",
            variables["RAY_SERVE_HAPROXY_BINARY_PATH"],
        ]
        [made] = first["volumeMounts"]
        assert made in container["volumeMounts"]
        assert {first["image"], container["image"]} == {"RLHF_RAY_IMAGE"}, "a placeholder, never somebody's registry"
        assert "serve" in {port["name"] for port in container["ports"]}
        claims = {each["metadata"]["name"] for each in documents() if each["kind"] == "PersistentVolumeClaim"}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    limits = container["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) == service.scorer.gpus
    assert float(limits["cpu"]) >= service.scorer.cpus


def test_requests_under_way_outlive_an_upgrade():
    document = only("RayService")
    service = ServiceSettings.model_validate(serve_config()["applications"][0]["args"]["service"])
    assert document["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > service.limits.deadline_s
    assert worker_group()["template"]["spec"]["terminationGracePeriodSeconds"] > service.endpoint.drain_timeout_s
    assert service.scaling.min_replicas >= 2, "one goes on while Serve replaces the other"


def test_prometheus_scrapes_the_service_once():
    [group] = only("ScrapeConfig")["spec"]["staticConfigs"]
    port = serve_config()["http_options"]["port"]
    assert group["targets"] == [f"{only('RayService')['metadata']['name']}-serve-svc.default.svc:{port}"]
