"""`make chaos`: processes of a run are killed, stopped, starved and broken, and it must end as if nothing had been.

Each part is on the tiny model with the real engines, and against the same run left alone; "equal" means
bit-for-bit the same `metrics.jsonl` except for times, trained weights, judged samples and ledger:

- `matrix`: each role, lost in each way, in the midst of a call and between calls;
- `pairs`: one role twice in one run, two roles at once, and a role while it is being built;
- `node`: one of two nodes goes away, with whatever was on it, and the other has room for that;
- `room`: the other has not;
- `hosts`: the link between two hosts (network namespaces, which need root) is cut;
- `kills`: random roles of a longer run, again and again;
- `job`: the whole job, at random moments of every phase, resumed by the same command;
- `cost`: what a run that loses nothing pays for all this;
- `machine`: disk and object store fill up, the folder cannot be written, W&B does not answer, the clock is set back
  (needs root).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from bench.chaos_cost import cost
from bench.chaos_hosts import hosts
from bench.chaos_machine import machine
from bench.chaos_site import DEADLINE_S, Outcome, Site
from bench.results import Report, Result
from rlhf_ray.randomness import keyed_generator
from tests.faults import METHODS, Fault, happened
from tests.system.commands import Command, rows_of, wait_until

HOWS = ("kill", "stop", "raise", "memory")
PHASES = ("starting the roles", "first sync", "a step", "a checkpoint", "a step")
LAST_PHASES = ("judging the policy after", "writing") * 2
"""Where a job is killed, one after the other: what it says, but for a moment of a step, and of writing a checkpoint.
After the last ones there are no steps any more."""


def recovery_s(outcome: Outcome, fault: Fault) -> float | None:
    """From the fault to the event that tells that its role is back."""
    struck = Path(fault.mark).stat().st_mtime
    for event in outcome.events:
        if event["kind"] == "role_restarted" and event["role"].startswith(fault.role):
            return datetime.fromisoformat(event["time"]).timestamp() - struck
        if event["kind"] == "rolled_back":
            return datetime.fromisoformat(event["time"]).timestamp() - struck
    return None


def matrix(site: Site, alone: Outcome, report: Report) -> None:
    times: dict[str, list[float]] = {"stateless": [], "learner": []}
    for role in METHODS:
        for how in HOWS:
            results = []
            for when in ("busy", "idle"):
                name = f"{role}-{how}-{when}"
                # The learners have one call a step, the others four.
                fault = site.fault(name, role, how, when, 2 if role in ("policy", "critic") else 6)
                outcome = site.run(name, faults=[fault])
                equal = outcome.equals(alone) and happened([fault])
                results.append(Result(f"{role}, {how}, {when}: equal to the run left alone", int(equal), target=">= 1"))
                seconds = recovery_s(outcome, fault) if happened([fault]) else None
                if seconds is not None:
                    results.append(Result(f"{role}, {how}, {when}: back after", round(seconds, 1), "s"))
                    times["learner" if role in ("policy", "critic") else "stateless"].append(seconds)
                if equal:
                    site.forget(name)
                else:
                    print(f"{name}: status {outcome.status}, {outcome.error}", flush=True)
            report.add(results, f"{role}, {how}")
    report.add(
        [
            Result(f"median recovery of a {kind} role", statistics.median(seconds), "s", target)
            for (kind, seconds), target in zip(times.items(), ("<= 60 s", None), strict=True)
            if seconds
        ],
        "recovery",
    )


def pairs(site: Site, alone: Outcome, report: Report) -> None:
    cases = {
        "generator twice": [("generator", "kill", "busy", 3), ("generator", "kill", "busy", 9)],
        "policy twice": [("policy", "kill", "busy", 1), ("policy", "kill", "busy", 2)],
        "generator and policy": [("generator", "kill", "busy", 6), ("policy", "kill", "busy", 2)],
        "policy and critic": [("policy", "kill", "busy", 2), ("critic", "kill", "busy", 2)],
        "scorer and reference": [("reward", "kill", "busy", 6), ("reference", "kill", "busy", 6)],
        **{f"{role} while starting": [(role, "kill", "start", 0)] for role in METHODS},
        "generator stopped while starting": [("generator", "stop", "start", 0)],
        "policy stopped while starting": [("policy", "stop", "start", 0)],
    }
    results = []
    for title, struck in cases.items():
        name = title.replace(" ", "-")
        faults = [site.fault(name, role, how, when, call) for role, how, when, call in struck]
        outcome = site.run(name, faults=faults)
        equal = outcome.equals(alone) and happened(faults)
        results.append(Result(f"{title}: equal to the run left alone", int(equal), target=">= 1"))
        if not equal:
            print(f"{name}: status {outcome.status}, {outcome.error}", flush=True)
    report.add(results, "two faults in one run")


def node(site: Site, alone: Outcome, report: Report) -> None:
    """The node that the driver is not on is lost after the first step; the other has room for all roles."""
    outcome, _ = _without_a_node(site, "node", 2, "cluster.placement_strategy=SPREAD")
    started = [event for event in outcome.events if event["kind"] == "role_started"]
    lost = sum(event["node"] == "127.0.0.3" for event in started)
    results = [
        Result("roles on the lost node", lost, target=">= 1"),
        Result("a node lost: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
    ]
    print(f"lost with the node: {lost} roles; {outcome.error}", flush=True)
    report.add(results, "a node")


def room(site: Site, report: Report) -> None:
    """As `node`, but the other node has no room for the role that was on the lost one."""
    results = []
    for key in ("generator", "policy.learner"):
        settings = (f"{key}.cpus=2", "evaluation={prompts: null, judge: none}")
        outcome, seconds = _without_a_node(site, f"no-room-{key}", 1, *settings)
        said = outcome.status == 1 and "cluster on ?: no room within" in outcome.error
        print(outcome.error, flush=True)
        results.append(Result(f"no room for {key} any more: said, status 1", int(said), target=">= 1"))
        results.append(Result(f"no room for {key} any more: ended after", round(seconds, 1), "s", "<= 60 s"))
    report.add(results, "a node, and no room on the other")


def _without_a_node(site: Site, name: str, cpus: float, *settings: str) -> tuple[Outcome, float]:
    """A run on two nodes, the second of two CPUs and lost after the first step; and how long it went on after that.

    Args:
        cpus: of the node that stays.
    """
    shape = {"object_store_memory": 200 << 20}
    head = {**shape, "num_cpus": cpus, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(**shape, num_cpus=2, node_ip_address="127.0.0.3")
        cluster.wait_for_nodes()
        command = site.begin(name, f"cluster.address={cluster.address}", *settings)
        rows = site.folder(name) / "metrics.jsonl"
        wait_until(lambda: rows_of(rows) or command.process.poll() is not None, DEADLINE_S, "the first step")
        lost = time.monotonic()
        cluster.remove_node(other, allow_graceful=False)
        command.wait(DEADLINE_S)
        return site.outcome(name, command), time.monotonic() - lost
    finally:
        cluster.shutdown()


def kills(site: Site, alone: Outcome, report: Report, count: int, *settings: str) -> None:
    """Random processes of one run, one after another, each when those before are back."""
    name = "kills"
    command = site.begin(name, *settings, f"cluster.max_restarts={count}")
    random, struck = keyed_generator(0, "kills"), 0
    while command.process.poll() is None and struck < count:
        time.sleep(float(random.uniform(2, 12)))
        hosts = sorted(role_processes(command), key=lambda pair: pair[0])
        if len(hosts) >= len(METHODS):
            role, process = hosts[int(random.integers(len(hosts)))]
            with suppress(psutil.NoSuchProcess):
                process.kill()
                struck += 1
                print(f"{struck}: {role}", flush=True)
    command.wait(DEADLINE_S * 4)
    outcome = site.outcome(name, command)
    print(outcome.error, flush=True)
    report.add(
        [
            Result("random kills of roles in one run", struck, target=f">= {count}"),
            Result("a run with random kills: equal to the run left alone", int(outcome.equals(alone)), target=">= 1"),
        ],
        "random kills",
    )


def role_processes(command: Command) -> Iterator[tuple[str, psutil.Process]]:
    """Role hosts below a driver, by the log that they write."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(command.process.pid).children(recursive=True):
            with suppress(psutil.Error, OSError):
                log = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
                if log.parent.name == "logs" and log.suffix == ".log":
                    yield log.stem, process


def job(site: Site, alone: Outcome, report: Report, label: str, count: int) -> None:
    """One run that is killed with everything below it in every phase, and begun again by the same command."""
    name = f"job-{label}"
    random, struck = keyed_generator(0, "job", label), 0
    outcome: Outcome | None = None
    while outcome is None or outcome.status:
        command = site.begin(name, "--resume")
        left = count - struck
        phase = LAST_PHASES[-left] if 0 < left <= len(LAST_PHASES) else PHASES[struck % len(PHASES)]
        if struck < count and _reached(command, phase, site.folder(name)):
            time.sleep(float(random.uniform(0, 1.5 if phase == "a step" else 0.2)))
            _kill_all(command)
            struck += 1
            print(f"{label}, {struck}: killed while {phase}", flush=True)
            continue
        command.wait(DEADLINE_S)
        outcome = site.outcome(name, command)
        if outcome.status:
            print(outcome.error, flush=True)
            break
    results = [
        Result(f"{label}: kills of the whole job", struck, target=f">= {count}"),
        Result(
            f"{label}: equal to the run left alone", int(outcome is not None and outcome.equals(alone)), target=">= 1"
        ),
    ]
    report.add(results, f"the whole job, {label}")


def _reached(command: Command, phase: str, folder: Path) -> bool:
    """Wait until a run is in a phase; false where it ends without."""
    rows = len(rows_of(folder / "metrics.jsonl"))
    while command.process.poll() is None:
        if phase == "a step":
            reached = len(rows_of(folder / "metrics.jsonl")) != rows
        elif phase == "a checkpoint":
            reached = any(not (path / "manifest.json").exists() for path in folder.glob("checkpoints/step-*"))
        else:
            reached = f"· {phase}" in command.stdout
        if reached:
            return True
        time.sleep(0.01)
    return False


def _kill_all(command: Command) -> None:
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(command.process.pid).children(recursive=True)
    os.killpg(command.process.pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    command.process.wait()
    psutil.wait_procs(below, timeout=30)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data").absolute())
    parser.add_argument("--parts", default="cost,matrix,pairs,node,room,hosts,kills,job,machine")
    parser.add_argument("--blocks", type=int, default=15, help="of ten steps each, in which the cost is measured")
    parser.add_argument("--kills", type=int, default=50, help="random kills of roles in one run")
    parser.add_argument("--jobs", type=int, default=40, help="kills of the whole job, half of them one step ahead")
    parser.add_argument("--keep", type=Path, help="folder to leave the runs in")
    arguments = parser.parse_args()
    report = Report("chaos")
    with _folder(arguments.keep) as runs:
        short = Site(arguments.data, runs / "short")
        longer = Site(arguments.data, runs / "longer", f"steps={4 * arguments.kills}", "checkpoint.every_steps=4")
        ahead = Site(arguments.data, runs / "ahead", "steps=30", "algorithm.max_staleness=1")
        in_turns = Site(arguments.data, runs / "in-turns", "steps=30")

        def jobs() -> None:
            for site, label in ((in_turns, "max_staleness 0"), (ahead, "max_staleness 1")):
                job(site, site.run("alone"), report, label, arguments.jobs // 2)

        parts: dict[str, Callable[[], None]] = {
            "cost": lambda: cost(short, report, arguments.blocks),
            "matrix": lambda: matrix(short, short.run("alone"), report),
            "pairs": lambda: pairs(short, short.run("alone-again"), report),
            "node": lambda: node(short, short.run("alone-on-one-node"), report),
            "room": lambda: room(short, report),
            "hosts": lambda: hosts(short, short.run("alone-on-one-host"), report),
            "machine": lambda: machine(short, short.run("alone-on-a-sound-machine"), report),
            "kills": lambda: kills(longer, longer.run("alone"), report, arguments.kills),
            "job": jobs,
        }
        for part in arguments.parts.split(","):
            parts[part]()


if __name__ == "__main__":
    main()
