"""Whether what the roles need is there: memory of nodes and GPUs, room for the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.config.settings import CheckpointSettings, GeneratorSettings
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.models.sizes import ITEM_BYTES, ModelSize
from rlhf_ray.preflight.findings import Findings, size_text
from rlhf_ray.preflight.memory import DRIVER_BYTES, RAY_BYTES
from rlhf_ray.preflight.needs import Need
from rlhf_ray.runtime.cluster import NodeShape

_MEMORY_SHARE = 0.95
"""Ray ends processes when more of a node's memory is in use."""
_LESS_HOST_MEMORY = "fewer replicas on a node, a smaller micro_batch_tokens, a smaller model, or more memory"
_LESS_GPU_MEMORY = {
    "learner": "gradient_checkpointing: true, a smaller micro_batch_tokens, or zero_stage: 3 over more replicas",
    "reference": "sharded: true over more replicas, or a smaller micro_batch_tokens",
    "reward": "sharded: true over more replicas, or a smaller batch_tokens",
    "generator": "a larger gpu_memory_utilization, tensor_parallel over more GPUs, or a shorter context",
}


@dataclass(frozen=True)
class Process:
    """One process of a role, on a node.

    Attributes:
        index: in its role.
    """

    need: Need
    index: int

    @property
    def host_bytes(self) -> float:
        memory = self.need.memory
        if memory is None:
            return 0.0
        return memory.host_bytes if self.index else memory.first_bytes


def place(needs: Sequence[Need], nodes: Sequence[NodeShape], strategy: str) -> list[list[Process]]:
    """About where Ray puts the processes: those with GPUs first; `PACK` fills one node after the other, `SPREAD` takes
    the emptiest. What fits nowhere is left out; `check_resources` says so.

    Returns:
        The processes of each node.
    """
    processes = [Process(need, index) for need in needs for index in range(need.request.settings.replicas)]
    processes.sort(key=lambda each: -each.need.request.settings.gpus)
    placed: list[list[Process]] = [[] for _ in nodes]
    free = [[node.cpus, node.gpus] for node in nodes]
    for process in processes:
        settings = process.need.request.settings
        asked = (settings.cpus, settings.gpus)
        fitting = [
            number for number, left in enumerate(free) if all(a <= b + 1e-9 for a, b in zip(asked, left, strict=True))
        ]
        if fitting:
            number = min(fitting, key=lambda each: len(placed[each])) if "SPREAD" in strategy else fitting[0]
            placed[number].append(process)
            free[number] = [left - amount for left, amount in zip(free[number], asked, strict=True)]
    return placed


def check_node_memory(
    findings: Findings, phases: Sequence[Sequence[Need]], nodes: Sequence[NodeShape], strategy: str
) -> None:
    """See that each node has the memory that its processes need in the phase that needs most."""
    for number, node in enumerate(nodes):
        most: dict[str, float] = {}
        for needs in phases:
            by_key: dict[str, float] = {}
            for process in place(needs, nodes, strategy)[number]:
                key = process.need.request.key
                by_key[key] = by_key.get(key, 0.0) + process.host_bytes
            most = max(most, by_key, key=lambda each: sum(each.values()))
        if not node.memory_bytes or not most:
            continue
        needed = sum(most.values()) + RAY_BYTES + (DRIVER_BYTES if number == 0 else 0.0)
        parts = ", ".join(f"{key} {size_text(size)}" for key, size in most.items())
        found = f"{size_text(needed)} of {size_text(node.memory_bytes)} ({parts}; Ray and the driver the rest)"
        if needed <= _MEMORY_SHARE * node.memory_bytes:
            findings.ok(f"memory of {node.address}", found)
        else:
            heaviest = max(most, key=lambda key: most[key])
            findings.change(heaviest, f"memory of {node.address}: the processes need {found}", _LESS_HOST_MEMORY)


def check_gpu_memory(findings: Findings, needs: Sequence[Need], nodes: Sequence[NodeShape]) -> None:
    """See that a GPU, or the share of one that a process has, holds what the process needs."""
    memories = [node.gpu_memory_bytes for node in nodes if node.gpus]
    if not memories:
        return
    if not all(memories):
        findings.unknown("GPU memory", "the nodes do not say how much their GPUs have")
        return
    for need in needs:
        settings, memory = need.request.settings, need.memory
        if not settings.gpus or memory is None:
            continue
        share, key = min(settings.gpus, 1.0), need.request.key
        if isinstance(settings, GeneratorSettings) and settings.kv_cache_bytes is None:
            key, share = f"{key}.gpu_memory_utilization", settings.gpu_memory_utilization
            if settings.gpus < share:
                findings.change(
                    key, f"{share:g} of a GPU that the engine has {settings.gpus:g} of", f"at most {settings.gpus:g}"
                )
                continue
        allowed = share * min(memories)
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in memory.device.items() if size)
        found = f"{size_text(memory.device_bytes)} of {size_text(allowed)} on its GPU ({parts})"
        if memory.device_bytes <= allowed:
            findings.ok(need.request.key, found)
        else:
            kind = need.request.key.rpartition(".")[2]
            findings.change(key, found, _LESS_GPU_MEMORY.get(kind, "a smaller model, or another dtype"))


def check_kv_cache(findings: Findings, settings: GeneratorSettings, size: ModelSize, context_tokens: int) -> None:
    """See that a KV cache of a given size holds the longest sequence, without which the engine does not start."""
    if settings.kv_cache_bytes is None:
        return
    item = ITEM_BYTES[resolve_dtype(settings.dtype, settings.gpus > 0)]
    longest = size.kv_bytes(item) * context_tokens // settings.tensor_parallel
    sequences = settings.kv_cache_bytes // longest
    found = f"{settings.kv_cache_bytes / (1 << 30):g} GiB hold {sequences} sequence(s) of {context_tokens} tokens"
    if sequences:
        findings.ok("KV cache", f"{found}, keys and values of a token take {size.kv_bytes(item) / 1e3:.1f} kB")
    else:
        findings.change("generator.kv_cache_gib", found, f"at least {longest / (1 << 30):.3f} GiB")


def check_disk(
    findings: Findings, needs: Sequence[Need], settings: CheckpointSettings, free: Mapping[str, int]
) -> None:
    """See that the checkpoints have room: one more than are kept is there while it is written.

    Args:
        free: bytes by node, where the runs' folder is.
    """
    checkpoint, exported = sum(need.checkpoint for need in needs), sum(need.exported for need in needs)
    if not checkpoint or not free:
        return
    needed, [address, least] = checkpoint * (settings.keep + 1) + exported, min(free.items(), key=lambda each: each[1])
    found = (
        f"{size_text(needed)} for {settings.keep} + 1 checkpoints of {size_text(checkpoint)} and {size_text(exported)} "
        f"of models; {size_text(least)} are free on {address}"
    )
    if needed > least:
        findings.change("checkpoint.keep", found, "fewer checkpoints, or paths.runs on a larger disk")
    else:
        findings.ok("disk", found)
