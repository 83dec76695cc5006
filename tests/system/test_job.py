"""The commands on a Ray cluster with token authentication that was there before: submitted, or joining it."""

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf_ray.tracking.run_folder import RunFolder
from tests.system.commands import PPO, REPOSITORY, Command, rows_of, start_program, user_environment, wait_until

pytestmark = pytest.mark.timeout(600)

PROGRAMS = Path(sys.executable).parent
STEPS = 5
SECRETS = {"WANDB_API_KEY": secrets.token_hex(20), "HF_TOKEN": f"hf_{secrets.token_hex(17)}"}
MAX_UPLOAD_BYTES = 8 << 20


@dataclass
class Cluster:
    """A head node of its own on this machine.

    Attributes:
        folder: Ray's files; short, because the path of a Unix socket may not be long.
        address: of the cluster.
        dashboard: where jobs are submitted.
        environment: of somebody who has the token.
        head: the node's process.
    """

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    head: psutil.Process

    def without_token(self) -> dict[str, str]:
        """The environment of somebody who has not."""
        kept = {name: value for name, value in self.environment.items() if not name.startswith("RAY_")}
        return {**kept, "HOME": str(self.folder)}

    def processes_of_runs(self) -> list[str]:
        """Command lines of drivers, of what started them, and of roles."""
        lines = []
        for process in self.head.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                lines.append(" ".join(process.cmdline()))
        return [
            line for line in lines if any(name in line for name in ("retry.sh", "rlhf-ray", "rlhf_ray", "RoleHost"))
        ]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def http_status(url: str) -> int | None:
    """Of a plain GET without a token, or None while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head` with a token."""
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    # The head's environment is its jobs' environment: the programs of this environment come first.
    environment = {
        **user_environment(),
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        **SECRETS,
    }
    port, dashboard, agent, client = free_ports(4)
    head = start_program(
        [
            str(PROGRAMS / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--object-store-memory={200 << 20}",
            "--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}", "--disable-usage-stats",
        ],
        folder / "head.log",
        environment,
        folder,
    )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(
            lambda: head.process.poll() is not None or http_status(f"{url}/api/version"),
            120,
            "a dashboard that answers",
        )
        assert head.process.poll() is None, head.stdout + head.stderr
        yield Cluster(folder, f"127.0.0.1:{port}", url, environment, psutil.Process(head.process.pid))
    finally:
        head.process.terminate()
        head.wait(60)
        left = head.left_running()
        shutil.rmtree(folder, ignore_errors=True)
    assert left == []


def ray_job(cluster: Cluster, environment: dict[str, str], verb: str, arguments: list[str], output: Path) -> Command:
    """`ray job <verb>` from the repository's root."""
    program = [str(PROGRAMS / "ray"), "job", verb, f"--address={cluster.dashboard}"]
    return start_program([*program, *arguments], output, environment, REPOSITORY)


def submit(
    cluster: Cluster, environment: dict[str, str], entrypoint: list[str], output: Path, name: str = "job"
) -> Command:
    """`ray job submit`; a job's name is its submission id."""
    arguments = [f"--submission-id={name}", "--working-dir=.", "--", *entrypoint]
    return ray_job(cluster, environment, "submit", arguments, output)


def test_a_job_without_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    assert http_status(f"{cluster.dashboard}/api/version") == 401
    job = submit(cluster, cluster.without_token(), ["touch", str(tmp_path / "ran")], tmp_path / "output")
    assert job.wait(120) != 0
    assert "Missing authentication token" in job.stdout + job.stderr
    assert not (tmp_path / "ran").exists()


def test_a_run_that_joins_without_the_token_is_refused(cluster: Cluster, data_root: Path, tmp_path: Path) -> None:
    settings = [f"paths.data={data_root}", f"paths.runs={tmp_path}/runs", f"cluster.address={cluster.address}"]
    command = start_program(
        [sys.executable, "-m", "rlhf_ray", *PPO, *settings], tmp_path / "output", cluster.without_token(), REPOSITORY
    )
    assert command.wait(120) == 2, command.stderr
    told = command.stderr.splitlines()[-1]  # Ray's own warning may come before it
    assert told.startswith(f"bad input: cluster.address: no Ray cluster answers at '{cluster.address}'")
    assert "RAY_AUTH_TOKEN_PATH" in told
    assert not (tmp_path / "runs").exists()


def test_preflight_asks_the_nodes_of_a_running_cluster(cluster: Cluster, data_root: Path, tmp_path: Path) -> None:
    def preflight(name: str, *overrides: str) -> Command:
        settings = [f"paths.data={data_root}", f"paths.runs={tmp_path}/runs", f"cluster.address={cluster.address}"]
        command = start_program(
            [sys.executable, "-m", "rlhf_ray", "preflight", PPO[1], *settings, *overrides],
            tmp_path / name,
            cluster.environment,
            REPOSITORY,
        )
        command.wait(120)
        return command

    sound = preflight("sound")
    assert sound.process.returncode == 0, sound.stdout + sound.stderr
    for said in ("of 2 CPUs and 0 of 0 GPUs on 1 node(s)", "on 1 node(s)", "path(s) readable", "✓ memory of "):
        assert said in sound.stdout
    assert not list((tmp_path / "runs").iterdir()), "nothing is left behind"

    ahead = preflight("ahead", "sampling.prompts_per_step=65536", "sampling.samples_per_prompt=64")
    assert ahead.process.returncode == 2
    assert "✗ object store of node" in ahead.stdout


def test_a_job_survives_its_driver_stops_without_a_rest_and_goes_on_to_its_end(
    cluster: Cluster, data_root: Path, tmp_path: Path
) -> None:
    """One command three times over: by `retry.sh` after a SIGKILL, and by hand after a stop."""
    script = PROGRAMS / "rlhf-ray"
    program = ["rlhf-ray"] if script.exists() else ["python", "-m", "rlhf_ray"]
    settings = [f"paths.data={data_root}", f"paths.runs={tmp_path}", f"steps={STEPS}", "checkpoint.every_steps=1"]
    command = [
        "env",
        "RETRY_DELAY_S=1",
        "bash",
        "cluster/retry.sh",
        "2",
        *program,
        *PPO,
        *settings,
        "evaluation.prompts=null",
        "--resume",
    ]
    run = RunFolder(tmp_path / "tiny-ppo")

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in rows_of(run.events) if event["kind"] == kind]

    first = submit(cluster, cluster.environment, command, tmp_path / "first", "first")
    wait_until(lambda: first.process.poll() is not None or run.latest_checkpoint(), 200, "a first checkpoint")
    os.kill(json.loads(run.lock.read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: len(events("run_started")) == 2, 200, "the retry")
    stop = ray_job(cluster, cluster.environment, "stop", ["first"], tmp_path / "stop")
    assert stop.wait(200) == 0, stop.stderr
    first.wait(60)
    assert "Job 'first' was stopped" in first.stdout + first.stderr
    wait_until(lambda: not cluster.processes_of_runs(), 30, "no process of a stopped run")
    [resumed], [stopped] = events("checkpoint_loaded"), events("run_stopped")
    assert (stopped["cause"], rows_of(run.metrics)[-1]["step"]) == ("signal 15", stopped["step"])

    last = submit(cluster, cluster.environment, command, tmp_path / "last", "last")
    assert last.wait(300) == 0, last.stdout + last.stderr
    assert "succeeded" in last.stdout + last.stderr
    assert json.loads(run.summary.read_text())["steps"] == STEPS
    assert [row["step"] for row in rows_of(run.metrics)] == list(range(1, STEPS + 1))
    begun = [event["kind"] for event in rows_of(run.events) if event["kind"] in ("run_started", "nothing_to_resume")]
    assert begun == ["run_started", "nothing_to_resume", "run_started", "run_started"]
    assert [event["step"] for event in events("checkpoint_loaded")] == [resumed["step"], stopped["step"]]

    written = [path for folder in (run.path, *cluster.folder.glob("session_2*/logs")) for path in folder.rglob("*")]
    token = (cluster.folder / "token").read_text()
    for secret in (token, *SECRETS.values()):
        assert not [path for path in written if path.is_file() and secret.encode() in path.read_bytes()]

    packages = list(cluster.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert len(packages) == 1
    [uploaded] = packages
    files = [path for path in uploaded.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_UPLOAD_BYTES
    assert (uploaded / "rlhf_ray" / "cli.py").exists()
    assert not {path.relative_to(uploaded).parts[0] for path in files} & {".git", ".venv", "data", "runs", "build"}


def test_a_service_outlives_its_command_and_leaves_serve_to_others(
    cluster: Cluster, data_root: Path, tmp_path: Path
) -> None:
    def serve_rm(name: str, *arguments: str) -> Command:
        command = start_program(
            [sys.executable, "-m", "rlhf_ray", "serve-rm", str(config), *arguments],
            tmp_path / name,
            cluster.environment,
            REPOSITORY,
        )
        command.wait(120)
        return command

    model, port, config = str(data_root / "tiny" / "reward_model"), free_ports(1)[0], tmp_path / "serve.yaml"
    settings = {
        "run": {"name": "service"},
        "paths": {"runs": str(tmp_path / "runs")},
        "models": {"main": {"path": model}},
        "endpoint": {"port": port},
        "cluster": {"address": cluster.address},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    health = f"http://127.0.0.1:{port}/health"

    detached = serve_rm("detached", "--detach")
    assert (detached.process.returncode, detached.stderr) == (0, "")
    assert http_status(health) == 200
    changed = serve_rm("changed", f"models.next={{path: {model}, shadow: true}}")
    assert (changed.process.returncode, changed.stderr) == (0, "")
    assert "next" in changed.stdout

    # The cluster's Serve would keep its address, which may be open to everybody, and say so in a log only.
    elsewhere = serve_rm("elsewhere", "run.name=other", f"endpoint.port={free_ports(1)[0]}", "--detach")
    assert elsewhere.process.returncode == 2
    assert f"bad input: endpoint: the cluster's Serve listens at 127.0.0.1:{port}, not at" in elsewhere.stderr

    stopped = serve_rm("stopped", "--stop")
    assert (stopped.process.returncode, stopped.stderr) == (0, "")
    assert http_status(health) == 404  # Serve is there for others, the service is not
