"""The reward service on a cluster that was there before: `python -m bench.serve_cluster`

A head of Ray with token authentication on loopback, and on it what an operator does: `serve-rm --detach`, other
models, another address (refused), `--stop`; then the file of `--write` with `serve deploy`, and the same file with
another model under load. MiniLM with new heads; HAProxy in front.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from bench.load import start_load
from bench.results import Report, Result
from bench.service import (
    free_port,
    get_json,
    new_reward_model,
    quiet_transformers,
    serve_command,
    wait_for,
    write_config,
)

NAME = "reward"
CLIENTS = 8
TOKEN = "a-token-for-a-cluster"
START_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 240.0
_POLL_S = 0.2
_PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A head on this machine.

    Attributes:
        address: of the cluster.
        dashboard: where `serve deploy` sends files.
        environment: of its processes, and of whoever has its token.
        process: it runs as long as this does.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A command to its end, with the cluster's token."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """`ray start --head` with the environment that docs/serving.md asks for.

    Raises:
        RuntimeError: it ended, or did not stop.
    """
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{_PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RLHF_RAY_TOKEN": TOKEN,
    }
    port, dashboard, agent, client = (free_port() for _ in range(4))
    command = [str(_PROGRAMS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--object-store-memory={200 << 20}", f"--port={port}", f"--ray-client-server-port={client}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        until(lambda: answers(f"{url}/api/version"), START_TIMEOUT_S, "the cluster's dashboard", process)
        yield Cluster(f"127.0.0.1:{port}", url, environment, process)
    finally:
        process.send_signal(signal.SIGTERM)
        if not wait_for(process, 60):
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError("the cluster did not stop within 60 s")


def answers(url: str) -> bool:
    """Whether anybody answers there, in whatever way."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def version_there(url: str) -> str:
    """The version of the only model; empty while nothing answers."""
    try:
        data = get_json(f"{url}/v1/models", TOKEN)["data"]
    except OSError:
        return ""
    return str(data[0]["version"]) if len(data) == 1 else ""


def until(condition: Callable[[], object], limit_s: float, what: str, process: subprocess.Popen[bytes]) -> float:
    """Seconds until a condition is true.

    Raises:
        RuntimeError: it stayed false, or the cluster ended.
    """
    started = time.perf_counter()
    while not condition():
        if wait_for(process, _POLL_S):
            raise RuntimeError(f"the cluster ended with status {process.returncode}")
        if time.perf_counter() - started > limit_s:
            raise RuntimeError(f"{what}: not within {limit_s:g} s")
    return time.perf_counter() - started


def command_results(there: Cluster, config: Path, models: tuple[Path, Path], url: str, texts: Path) -> list[Result]:
    """`serve-rm` from a command that does not hold the service."""
    started = time.perf_counter()
    detached = there.run(serve_command(config, ["--detach"]))
    detach_s = time.perf_counter() - started
    print(detached.stdout + detached.stderr, flush=True)
    first = version_there(url)
    load = start_load(url, texts, config.parent / "load.jsonl", seconds=3600, clients=CLIENTS, token=TOKEN)
    changed = there.run(serve_command(config, [f"models.{NAME}.path={models[1]}"]))
    print(changed.stdout + changed.stderr, flush=True)
    outcome = load.stop()
    elsewhere = there.run(serve_command(config, ["run.name=other", f"endpoint.port={free_port()}", "--detach"]))
    print(elsewhere.stderr, flush=True)
    report = there.run(serve_command(config, ["--report"]))
    second = version_there(url)
    stopped = there.run(serve_command(config, ["--stop"]))
    print(stopped.stdout + stopped.stderr, flush=True)
    return [
        Result("serve-rm --detach: status", detached.returncode, target="<= 0"),
        Result("serve-rm --detach: from the command to its end", detach_s, "s"),
        Result("other models: status", changed.returncode, target="<= 0"),
        Result(
            "other models: another version answers", int("" not in (first, second) and first != second), target=">= 1"
        ),
        Result("other models: answers meanwhile", outcome.summary.accepted, target=">= 1"),
        Result("other models: failures", outcome.summary.failed, target="<= 0"),
        Result("another address than Serve's: status", abs(elsewhere.returncode - 2), target="<= 0"),
        Result("--report: status", report.returncode, target="<= 0"),
        Result("--stop: status", stopped.returncode, target="<= 0"),
        Result("--stop: still scores", int(bool(version_there(url))), target="<= 0"),
    ]


def deploy_results(there: Cluster, config: Path, models: tuple[Path, Path], url: str, texts: Path) -> list[Result]:
    """`serve deploy` of the file that `--write` makes, and of the same file with another model."""
    file = config.parent / "deploy.yaml"
    there.run(serve_command(config, ["--write", str(file)]))
    deploy = [str(_PROGRAMS / "serve"), "deploy", "--address", there.dashboard, str(file)]
    deployed = there.run(deploy)
    print(deployed.stdout + deployed.stderr, flush=True)
    up_s = until(lambda: version_there(url), START_TIMEOUT_S, "a score after serve deploy", there.process)
    first = version_there(url)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    document["applications"][0]["deployments"][0]["user_config"]["models"][0]["path"] = str(models[1])
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    load = start_load(url, texts, config.parent / "load.jsonl", seconds=3600, clients=CLIENTS, token=TOKEN)
    again = there.run(deploy)
    swap_s = until(lambda: version_there(url) not in ("", first), START_TIMEOUT_S, "the other model", there.process)
    outcome = load.stop()
    return [
        Result("serve deploy: status", deployed.returncode, target="<= 0"),
        Result("serve deploy: from its end to the first score", up_s, "s"),
        Result("serve deploy, another model: status", again.returncode, target="<= 0"),
        Result("serve deploy, another model: from its end to the model", swap_s, "s"),
        Result("serve deploy, another model: answers meanwhile", outcome.summary.accepted, target=">= 1"),
        Result("serve deploy, another model: failures", outcome.summary.failed, target="<= 0"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The reward service on a cluster that was there before.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    arguments = parser.parse_args()
    quiet_transformers()
    report = Report("serve_cluster")
    texts = (arguments.data / "hutto-movie" / "snippets_test.jsonl").absolute()
    # Short, because the path of a Unix socket may not be long.
    with TemporaryDirectory(prefix="rc", dir="/tmp") as name:
        folder = Path(name)
        first, second = (new_reward_model(arguments.data / "minilm", folder / f"v{seed}", seed) for seed in (0, 1))
        port = free_port()
        with cluster(folder) as there:
            entry = {"name": NAME, "path": str(first)}
            config = write_config(folder / "serve.yaml", [entry], port, cluster={"address": there.address})
            for part, results in (("commands", command_results), ("serve deploy", deploy_results)):
                report.add(results(there, config, (first, second), f"http://127.0.0.1:{port}", texts), part)


if __name__ == "__main__":
    main()
