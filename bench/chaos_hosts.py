"""Two hosts that share only a file system: network namespaces, and a link between them that can be cut."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from bench.chaos_site import DEADLINE_S, Outcome, Site
from bench.results import Report, Result
from tests.system.commands import rows_of, user_environment, wait_until

_HEAD, _OTHER = "rlhf-ray-a", "rlhf-ray-b"
_WIRE = "wire"
_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
_ADDRESSES = {_HEAD: "10.77.0.1", _OTHER: "10.77.0.2"}
"""Of the namespaces' own link; nothing outside them has it."""


def hosts(site: Site, alone: Outcome, report: Report) -> None:
    """The link is cut after the first step; the head's host has room for all roles."""
    with two_hosts(site.runs / "two-hosts") as address:
        command = site.begin(
            "hosts",
            f"cluster.address={address}",
            "cluster.placement_strategy=SPREAD",
            before=("ip", "netns", "exec", _HEAD),
            environment=_TOKEN,
        )
        rows = site.folder("hosts") / "metrics.jsonl"
        wait_until(lambda: rows_of(rows) or command.process.poll() is not None, DEADLINE_S, "the first step")
        _ip("-n", _HEAD, "link", "set", _WIRE, "down")
        command.wait(DEADLINE_S)
    outcome = site.outcome("hosts", command)
    started = [event for event in outcome.events if event["kind"] == "role_started"]
    lost = sum(event["node"] == _ADDRESSES[_OTHER] for event in started)
    print(f"behind the cut: {lost} roles; {outcome.error}", flush=True)
    report.add(
        [
            Result("roles behind the cut", lost, target=">= 1"),
            Result("the link cut: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
        ],
        "two hosts",
    )


@contextmanager
def two_hosts(logs: Path) -> Iterator[str]:
    """A Ray cluster over both; gives its address, which only they can reach."""
    logs.mkdir(parents=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name in _ADDRESSES:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", _HEAD, "link", "add", _WIRE, "type", "veth", "peer", "name", _WIRE, "netns", _OTHER)
        for name, address in _ADDRESSES.items():
            _ip("-n", name, "address", "add", f"{address}/30", "dev", _WIRE)
            _ip("-n", name, "link", "set", _WIRE, "up")
        meeting = f"{_ADDRESSES[_HEAD]}:6379"
        for name, place in ((_HEAD, ("--head", "--port=6379", "--include-dashboard=false")), (_OTHER, ())):
            arguments = [*place] if place else [f"--address={meeting}"]
            arguments += [f"--node-ip-address={_ADDRESSES[name]}", "--num-cpus=2", "--object-store-memory=209715200"]
            processes.append(_ray(name, logs / f"{name}.log", ["start", "--block", *arguments]))
            wait_until(partial(_joined, name, meeting, logs), 120.0, f"{name} in the cluster")
        yield meeting
    finally:
        below = [each for process in processes for each in psutil.Process(process.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(below, timeout=30)
        for name in _ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _ray(name: str, log: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    program = ["ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", *arguments]
    with log.open("wb") as output:
        environment = {**user_environment(), **_TOKEN}
        return subprocess.Popen(program, env=environment, stdout=output, stderr=output, start_new_session=True)


def _joined(name: str, meeting: str, logs: Path) -> bool:
    """Whether as many nodes as there should be answer from a host."""
    program = f"import ray; ray.init('{meeting}'); print('nodes', sum(node['Alive'] for node in ray.nodes()))"
    wanted = 1 + list(_ADDRESSES).index(name)
    done = subprocess.run(
        ["ip", "netns", "exec", _HEAD, sys.executable, "-c", program],
        env={**user_environment(), **_TOKEN},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    (logs / "joined.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return f"nodes {wanted}" in done.stdout


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, env=os.environ)
