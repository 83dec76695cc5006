"""`rlhf-ray serve-rm`: bring the service up, change it, show it, stop it.

This module imports Ray inside its functions: Ray reads from the environment, when it is imported, whether a cluster
asks for a token, and Serve that HAProxy is in front and where its files are.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from rlhf_ray.config.serving import ServedModelSettings, ServiceSettings, ServingConfig
from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure
from rlhf_ray.reward.serve.audit import read_key
from rlhf_ray.reward.serve.auth import read_token
from rlhf_ray.reward.serve.haproxy import BINARY_VARIABLE, write_program
from rlhf_ray.reward.serve.model_table import check_models
from rlhf_ray.reward.serve.report import show_status
from rlhf_ray.runtime.stopping import stop_signals

STATE_NAME = "service.json"
_AUTH_MODE = "RAY_AUTH_MODE"
_POLL_S = 0.2
_MONITOR_TIMEOUT_S = 30.0
_STATUS_POLL_S = 5.0
_STOP_GRACE_S = 30.0
_PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class ServiceState:
    """A service that runs; `service.json` in the run's folder.

    Attributes:
        url: where it answers.
        ray_address: of its cluster.
        ray_auth_mode: `token` where that cluster asks for one.
        pid: of the command that holds it; None where it was detached from it.
        started: when that process began, as the kernel counts: a later process may have its id.
        hostname: where that command runs.
    """

    url: str
    ray_address: str
    ray_auth_mode: str | None
    pid: int | None
    started: int | None
    hostname: str

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        temporary = folder / f".{STATE_NAME}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / STATE_NAME)

    @property
    def is_local(self) -> bool:
        """Whether a process of this machine holds it."""
        return self.pid is not None and self.hostname == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether that process is still there."""
        return self.pid is not None and _start_of(self.pid) == self.started

    @classmethod
    def load(cls, folder: Path) -> ServiceState | None:
        """Of a run's folder; None where no service was left running.

        Raises:
            BadInput: the file is not one of these.
        """
        path = folder / STATE_NAME
        if not path.is_file():
            return None
        try:
            state = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(str(path), f"cannot be read ({error})", "the file that serve-rm wrote") from None
        if state.is_local and not state.is_alive:
            # Its command was killed, and took its cluster along.
            path.unlink()
            return None
        return state


def absolute_service(config: ServingConfig) -> ServiceSettings:
    """The service's settings with absolute paths: replicas run elsewhere. Links stay: a token that Kubernetes mounts is
    one, and points elsewhere when it is exchanged."""
    service = ServiceSettings.model_validate(config.model_dump(include=set(ServiceSettings.model_fields)))
    folder = service.audit.folder or str(_run_folder(config) / "audit")
    token_file = service.endpoint.token_file
    key_file = {"key_file": str(Path(service.audit.key_file).absolute()) if service.audit.key_file else None}
    endpoint = {"token_file": str(Path(token_file).absolute()) if token_file else None}
    return service.model_copy(
        update={
            "audit": service.audit.model_copy(update={"folder": str(Path(folder).resolve()), **key_file}),
            "endpoint": service.endpoint.model_copy(update=endpoint),
        }
    )


def absolute_models(config: ServingConfig) -> tuple[ServedModelSettings, ...]:
    """The models with absolute paths."""
    return tuple(model.model_copy(update={"path": str(Path(model.path).resolve())}) for model in config.served)


def run_service(config: ServingConfig, detach: bool) -> None:
    """Bring the service up and hold it until a signal; or, where it runs already, change it.

    Args:
        detach: return once it scores. Only on a cluster that outlives this command.

    Raises:
        BadInput, Refused: the configuration or a model cannot be used; nothing was started.
        RoleFailure: the service did not score in time.
    """
    token = read_token(config.endpoint)
    check_models(config.served, config.scorer)
    if config.audit.enabled:
        read_key(config.audit)
    folder = _run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    running = ServiceState.load(folder)
    if running is not None:
        _change(config, running, token)
        return
    local = not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if detach and local:
        raise BadInput("--detach", "the cluster of this command ends with it", "cluster.address of a running cluster")
    if local:
        _check_port(config)
    with _environment(local):
        from ray import serve

        from rlhf_ray.runtime.cluster import connect, disconnect

        started = time.monotonic()
        connect(config.cluster)
        _quiet()
        try:
            _check_address(config)
            serve.start(http_options={"host": config.endpoint.host, "port": config.endpoint.port})
            # Here, and not before: Ray has put a handler of its own in place.
            with stop_signals() as stopping:
                was_there = config.run.name in serve.status().applications
                try:
                    _bring_up(config, folder, token, detach, stopping)
                except BaseException:
                    if not local and not was_there:  # the cluster outlives this command
                        _delete(config.run.name)
                    raise
                if not stopping:
                    took = time.monotonic() - started
                    print(f"{config.run.name} scores at {_url(config)} after {took:.0f} s", flush=True)
                    if detach:
                        return
                    print("its page is there too; Ctrl-C, or the same command with --stop, ends it", flush=True)
                    _hold(config.run.name, stopping)
                print("stopping: requests under way are answered first", flush=True)
                _delete(config.run.name)
        finally:
            if not detach:
                (folder / STATE_NAME).unlink(missing_ok=True)
            disconnect()


def _bring_up(config: ServingConfig, folder: Path, token: str | None, detach: bool, stopping: Sequence[int]) -> None:
    """Deploy, and wait until it scores, or a signal came."""
    import ray
    from ray import serve

    from rlhf_ray.reward.serve.application import application

    service = application(absolute_service(config), absolute_models(config))
    serve.run(service, name=config.run.name, route_prefix="/", blocking=False)
    _wait_until_it_scores(config, _url(config), token, stopping)
    if stopping:
        return
    pid = None if detach else os.getpid()
    began = None if pid is None else _start_of(pid)
    address, mode = ray.get_runtime_context().gcs_address, os.environ.get(_AUTH_MODE)
    ServiceState(_url(config), address, mode, pid, began, socket.gethostname()).save(folder)


def stop_service(config: ServingConfig) -> None:
    """End the service of a run, wherever its command runs.

    Raises:
        BadInput: there is none.
        RoleFailure: it did not end in time.
    """
    folder = _run_folder(config)
    running = ServiceState.load(folder)
    if running is None:
        raise BadInput("run.name", f"no service of '{folder}' is running", "a run whose service is up")
    if running.is_local and running.pid is not None:
        os.kill(running.pid, signal.SIGTERM)
        limit = config.endpoint.drain_timeout_s + _STOP_GRACE_S
        if not _wait_until(lambda: not running.is_alive, limit):
            raise _failure(config, f"process {running.pid} did not stop within {limit:g} s")
    else:
        with _joined(running):
            _delete(config.run.name)
        (folder / STATE_NAME).unlink(missing_ok=True)
    print(f"{config.run.name} is stopped", flush=True)


def report_service(config: ServingConfig) -> None:
    """Print what the service knows of itself.

    Raises:
        BadInput: there is none.
        RoleFailure: it does not answer.
    """
    running = ServiceState.load(_run_folder(config))
    if running is None:
        raise BadInput("run.name", f"no service of '{_run_folder(config)}' is running", "a run whose service is up")
    show_status(_status(config, running.url, read_token(config.endpoint)))


def replay_audit(config: ServingConfig, folder: Path, texts: Path | None, heads: Path | None) -> None:
    """Verify an audit log and score its records again with the configured models.

    Args:
        texts: file with the texts, where the log keeps hashes only.
        heads: an answer of `/v1/service` that was kept, beyond which every chain must have got.

    Raises:
        BadInput: the log is not intact, or the file of texts cannot be read.
        RoleFailure: a score is another one now, or a record could not be scored again.
    """
    from rlhf_ray.reward.core.scorer import RewardScorer
    from rlhf_ray.reward.serve.audit import read_heads
    from rlhf_ray.reward.serve.audit_replay import replay
    from rlhf_ray.reward.serve.scorer_process import reward_settings

    scorers = [RewardScorer(reward_settings(config.scorer, model.path)) for model in config.served]
    report = replay(
        folder,
        {scorer.version: scorer for scorer in scorers},
        texts=str(texts) if texts else None,
        key=read_key(config.audit),
        heads=read_heads(heads) if heads else (),
    )
    print(f"{report.num_equal} scores are bit-for-bit the same", flush=True)
    for each in report.differences[:10]:
        who = f" of {each.caller}" if each.caller else ""
        print(f"{each.place}: request {each.request_id}{who}: {each.logged!r}, now {each.replayed!r}", flush=True)
    for cause, count in Counter(each.cause for each in report.not_replayed).items():
        print(f"not replayed: {count}, {cause}", flush=True)
    if not report.exact:
        faults = f"{len(report.differences)} scores are others now, {len(report.not_replayed)} could not be replayed"
        raise _failure(config, f"'{folder}': {faults}")


def write_serve_config(config: ServingConfig, path: Path) -> None:
    """Write what `serve deploy` takes, and KubeRay's RayService as `serveConfigV2`."""
    import yaml
    from ray.serve.schema import ServeDeploySchema

    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.endpoint.host, "port": config.endpoint.port},
        "applications": [
            {
                "name": config.run.name,
                "route_prefix": "/",
                "import_path": "rlhf_ray.reward.serve.application:build",
                "args": {"service": absolute_service(config).model_dump(mode="json")},
                # Apart from the arguments: other models are a light update of the monitor, and restart nothing.
                "deployments": [
                    {
                        "name": "monitor",
                        "user_config": {"models": [model.model_dump(mode="json") for model in absolute_models(config)]},
                    }
                ],
            }
        ],
    }
    ServeDeploySchema.model_validate(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    print(f"wrote {path}", flush=True)


def _change(config: ServingConfig, running: ServiceState, token: str | None) -> None:
    """Order other models of a running service, and wait until every replica has them. Where other settings have
    changed, its replicas are replaced one after another."""
    service, models = absolute_service(config), absolute_models(config)
    with _joined(running):
        from ray import serve

        from rlhf_ray.reward.serve.application import application

        monitor = serve.get_deployment_handle("monitor", config.run.name)
        if monitor.settings.remote().result(timeout_s=_MONITOR_TIMEOUT_S) == service.model_dump(mode="json"):
            monitor.order_models.remote(models).result(timeout_s=_MONITOR_TIMEOUT_S)
        else:
            print("other settings than the models have changed: the replicas are replaced", flush=True)
            serve.run(application(service, models), name=config.run.name, route_prefix="/", blocking=False)
    ordered = {model.name for model in models}
    last: dict[str, Any] = {}

    def followed() -> bool:
        try:
            last.update(_status(config, running.url, token))
        except RoleFailure:  # the monitor, too, may be exchanged
            return False
        replicas = last["replicas"]
        if {row["name"] for row in last["models"]} != ordered:
            return False
        if failures := {why for replica in replicas if (why := replica["load_failure"]) is not None}:
            raise _failure(config, f"the models that are served stay: {'; '.join(sorted(failures))}")
        return bool(replicas) and all(replica["order"] == last["order"] for replica in replicas)

    if not _wait_until(followed, config.endpoint.start_timeout_s):
        raise _failure(config, f"not every replica has the new models after {config.endpoint.start_timeout_s:g} s")
    for row in last["models"]:
        state = f"rolled back earlier ({row['reason']})" if row["role"] == "rolled_back" else row["role"]
        print(f"{row['name']} {row['version']}: {state}", flush=True)
    print(f"{config.run.name} at {running.url} has the models", flush=True)


def _delete(name: str) -> None:
    """End the application and no more: a cluster may have others."""
    from ray import serve

    from rlhf_ray.reward.serve.orders import ClusterStore

    serve.delete(name)
    ClusterStore(name).clear()


def _hold(name: str, stopping: list[int]) -> None:
    """Wait for a signal, or for somebody else to delete the application."""
    from ray import serve

    next_look = time.monotonic() + _STATUS_POLL_S
    waiting = threading.Event()
    while not stopping:
        waiting.wait(_POLL_S)
        if time.monotonic() >= next_look:
            if name not in serve.status().applications:
                return
            next_look = time.monotonic() + _STATUS_POLL_S


def _wait_until_it_scores(config: ServingConfig, url: str, token: str | None, stopping: Sequence[int]) -> None:
    from ray import serve

    name = config.run.name

    def scores() -> bool:
        if stopping:
            return True
        application = serve.status().applications.get(name)
        if application is not None and application.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
            deployments = "; ".join(each.message for each in application.deployments.values() if each.message)
            raise _failure(config, _last_line(deployments or application.message))
        try:
            return httpx.get(f"{url}/health/ready", headers=_headers(token), timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    if not _wait_until(scores, config.endpoint.start_timeout_s):
        raise _failure(config, f"nothing was scored at {url} within {config.endpoint.start_timeout_s:g} s")


def _status(config: ServingConfig, url: str, token: str | None) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/v1/service", headers=_headers(token), timeout=10.0)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise _failure(config, f"{url} does not answer ({error})") from None
    return dict(answer.json())


def _wait_until(condition: Any, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        if condition():
            return True
        pause.wait(_POLL_S)
    return False


@contextmanager
def _joined(running: ServiceState) -> Iterator[None]:
    """In the cluster of a running service."""
    if running.ray_auth_mode:
        os.environ.setdefault(_AUTH_MODE, running.ray_auth_mode)

    from rlhf_ray.runtime.cluster import connect, disconnect

    connect(ClusterSettings(address=running.ray_address))
    _quiet()
    try:
        yield
    finally:
        disconnect()


def _quiet() -> None:
    """Serve's own notes stay off the terminal; its logs are in Ray's session folder."""
    # Its import sets the level that is set here.
    import ray.serve  # noqa: F401

    logging.getLogger("ray.serve").setLevel(logging.ERROR)


@contextmanager
def _environment(local: bool) -> Iterator[None]:
    """Serve's environment: HAProxy in front of the replicas, with files and ports of its own.

    On a cluster that was there before, its own environment decides (see docs/serving.md).
    """
    if not local:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-serve-") as folder:
        write_program(Path(folder, "haproxy"))
        metrics_port, stats_port = _two_free_ports()
        os.environ.update(
            {
                BINARY_VARIABLE: f"{folder}/haproxy",
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_HAPROXY_NBTHREAD": "1",
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
                "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
                "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
                "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
                # Scoring changes nothing: what a dying replica left unanswered is asked again elsewhere.
                "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
                # How long a replica waits for balancers to forget it; there is one, here, and it knows at once.
                "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
                "RAY_SERVE_LOG_TO_STDERR": "0",
            }
        )
        yield


def _check_port(config: ServingConfig) -> None:
    """See that the port is free, before anything starts.

    Raises:
        BadInput: somebody listens there.
    """
    endpoint = config.endpoint
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError as error:
            raise BadInput(
                "endpoint.port", f"{endpoint.host}:{endpoint.port} cannot be used ({error.strerror})", "a free port"
            ) from None


def _check_address(config: ServingConfig) -> None:
    """See that a Serve which runs on the cluster already listens where this service is to: it would keep its own
    address, which may be open to everybody, and say so in a log only.

    Raises:
        BadInput: it listens elsewhere.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there, wanted = client.http_config, config.endpoint
    if (there.host, there.port) != (wanted.host, wanted.port):
        raise BadInput(
            "endpoint",
            f"the cluster's Serve listens at {there.host}:{there.port}, not at {wanted.host}:{wanted.port}",
            "where it listens, or a cluster on which `serve shutdown` was called",
        )


def _two_free_ports() -> list[int]:
    """Below those that kernels hand out by themselves: Ray's processes start before HAProxy does, and one of them could
    be given a port that was free a moment ago."""
    found: list[int] = []
    for place in range(len(_PORTS)):
        port = _PORTS[(2 * os.getpid() + place) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == 2:
            return found
    cause = f"no two free ports from {_PORTS[0]} to {_PORTS[-1]} for HAProxy"
    raise RoleFailure(FailureKind.INFRASTRUCTURE, "serve-rm", socket.gethostname(), cause)


def _url(config: ServingConfig) -> str:
    host = config.endpoint.host
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{config.endpoint.port}"


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _run_folder(config: ServingConfig) -> Path:
    return Path(config.paths.runs) / config.run.name


def _start_of(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks; None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _failure(config: ServingConfig, cause: str) -> RoleFailure:
    return RoleFailure(FailureKind.FATAL, f"service {config.run.name}", socket.gethostname(), cause)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the deployment failed"
