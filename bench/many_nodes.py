"""`make bench-nodes`: two steps of configs/multi-node/ppo-70b.yaml on eight nodes of Ray on this machine, with stubs.

Placement, ranks, meeting points, calls, weight path and loop are the real ones; GPUs are numbers that Ray counts. By
default every count of the configuration is a quarter (16 GPUs, 15 processes): `--full` has all 64 GPUs and 51
processes, for which this machine needs 16 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from bench.results import Result, publish
from bench.stub_inputs import stub_inputs
from bench.stubs import StubSettings, stub_classes
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.loop import run_roles
from rlhf_ray.ppo.roles import role_requests

CONFIG = Path(__file__).parents[1] / "configs" / "multi-node" / "ppo-70b.yaml"
NODES = 8
# A sharded reference has two ranks at least; the critic makes room for the second.
QUARTER = (
    "generator.gpus=2",
    "generator.tensor_parallel=2",
    "generator.cpus=4",
    "policy.learner.replicas=8",
    "critic.learner.replicas=1",
    "reference.replicas=2",
    "reward.replicas=1",
)


@contextmanager
def fake_cluster(gpus_per_node: int) -> Iterator[str]:
    """Nodes with addresses of their own and GPUs that are numbers; gives the address of the cluster."""
    node = {"num_cpus": 32, "num_gpus": gpus_per_node, "object_store_memory": 80 << 20}
    head = {**node, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for index in range(1, NODES):
            cluster.add_node(**node, node_ip_address=f"127.0.0.{index + 2}")
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@dataclass(frozen=True)
class Process:
    """What one role wrote down.

    Attributes:
        role: which it is.
        place: where it is.
        facts: the rest.
    """

    role: str
    place: dict[str, Any]
    facts: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> Process:
        place, *facts = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        return cls(place["role"], place, tuple(facts))

    @property
    def bundle(self) -> int:
        """Of the placement group, as Ray names the resources of the bundle that the process is in."""
        found = {int(match[1]) for name in self.place["resources"] if (match := re.match(r"CPU_group_(\d+)_", name))}
        [bundle] = found
        return bundle

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [fact for fact in self.facts if fact["kind"] == kind]


def faults_of(config: PPOConfig, processes: Sequence[Process]) -> list[str]:
    """Everything that is not as the configuration asks for."""
    faults = []
    wanted = [request for request in role_requests(config) for _ in range(request.settings.replicas)]
    bundles = Counter(process.bundle for process in processes)
    if bundles != Counter(range(len(wanted))):
        faults.append(f"bundles with other than one process: {bundles}")
    taken: Counter[tuple[str, int]] = Counter()
    for process in processes:
        request, place = wanted[process.bundle], process.place
        name = f"{process.role} in bundle {process.bundle}"
        if request.role != process.role:
            faults.append(f"{name}: that bundle is for {request.role}")
        if place["node"] != place["bundle_nodes"][str(process.bundle)]:
            faults.append(f"{name} is not on the node of its bundle")
        if len(place["gpus"]) != request.settings.gpus:
            faults.append(f"{name} sees GPUs {place['gpus']}, not {request.settings.gpus:g}")
        taken.update((place["node"], gpu) for gpu in place["gpus"])
    faults += [
        f"GPU {gpu} of node {node} belongs to {count} processes" for (node, gpu), count in taken.items() if count > 1
    ]
    return faults + _meeting_faults(config, processes) + _version_faults(config, processes)


def _meeting_faults(config: PPOConfig, processes: Sequence[Process]) -> list[str]:
    faults = []
    groups: dict[str, list[tuple[Process, dict[str, Any]]]] = {}
    for process in processes:
        for meeting in process.of_kind("meeting"):
            groups.setdefault(meeting["group"], []).append((process, meeting))
    sizes = {"policy": config.policy.learner.replicas}
    if config.critic is not None:
        sizes["critic"] = config.critic.learner.replicas
    if config.reference is not None and config.reference.sharded:
        sizes["reference"] = config.reference.replicas
    if config.weights.transport == "nccl":
        sizes["weights"] = 1 + config.generator.replicas * config.generator.tensor_parallel
    if groups.keys() != sizes.keys():
        faults.append(f"groups that met: {sorted(groups)}, not {sorted(sizes)}")
    points: set[tuple[str, int]] = set()
    for group, members in groups.items():
        ranks = [meeting["rank"] + worker for _, meeting in members for worker in range(meeting["workers"])]
        if sorted(ranks) != list(range(sizes[group])):
            faults.append(f"{group}: ranks {sorted(ranks)}, not 0 to {sizes[group] - 1}")
        met = {(meeting["master_address"], meeting["master_port"]) for _, meeting in members}
        if len(met) != 1 or met & points:
            faults.append(f"{group}: meets at {met}, others at {points}")
        points |= met
        first = next(process for process, meeting in members if meeting["rank"] == 0)
        if {address for address, _ in met} != {first.place["address"]}:
            faults.append(f"{group}: meets at {met}, but its first rank is on {first.place['address']}")
    return faults


def _version_faults(config: PPOConfig, processes: Sequence[Process]) -> list[str]:
    faults = []
    for process in processes:
        if process.role != "generator":
            continue
        loaded = [fact["version"] for fact in process.of_kind("loaded")]
        if loaded != list(range(config.steps + 1)):
            faults.append(f"a generator loaded versions {loaded}, not 0 to {config.steps}")
        faults += [
            f"shard {fact['shard']} was to be sampled with version {fact['asked']}, not {fact['had']}"
            for fact in process.of_kind("sampled")
            if fact["asked"] != fact["had"]
        ]
    return faults


def run(full: bool, folder: Path, overrides: Sequence[str] = ()) -> list[Result]:
    """Two steps, and held-out prompts whose shards do not divide among the reference's ranks."""
    facts = folder / "facts"
    facts.mkdir()
    before = set(psutil.Process().children(recursive=True))
    with fake_cluster(8 if full else 2) as address:
        own = [f"cluster.address={address}", f"paths.runs={folder / 'runs'}", "steps=2", "tracking.progress=lines"]
        config = load_config(PPOConfig, CONFIG, [*([] if full else QUARTER), *own, *overrides])
        stub = StubSettings(facts=facts)
        held_out = 2 * config.sampling.prompts_per_shard + 1
        run_roles(config, stub_inputs(config, stub, num_prompts=1000, num_held_out=held_out), stub_classes(stub))
        started = set(psutil.Process().children(recursive=True)) - before
    ray.shutdown()
    _, alive = psutil.wait_procs(list(started), timeout=30)
    processes = [Process.read(path) for path in sorted(facts.glob("*.jsonl"))]
    faults = faults_of(config, processes)
    for fault in faults:
        print(fault)
    gpus = sum(len(process.place["gpus"]) for process in processes)
    wanted = sum(request.settings.replicas for request in role_requests(config))
    return [
        Result("nodes with roles", len({process.place["node"] for process in processes}), target=f">= {NODES}"),
        Result("processes", len(processes), target=f">= {wanted}"),
        Result("GPUs assigned", gpus, target=f">= {NODES * (8 if full else 2)}"),
        Result("faults", len(faults), target="<= 0"),
        Result("processes left behind", len(alive), target="<= 0"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="all 64 GPUs")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112 (Ray's own name; nobody would use them)
    with tempfile.TemporaryDirectory() as folder:
        results = run(arguments.full, Path(folder), arguments.overrides)
    publish("many_nodes", results)
    if not all(result.holds for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
