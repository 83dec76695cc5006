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
_WHILE_TRAINING = ("activations", "logits")
"""What a learner gives back between two steps."""
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
    """About where Ray puts the processes: those with GPUs first, with those that share them; `PACK` fills one node
    after the other, `SPREAD` takes the emptiest. What fits nowhere is left out; `check_resources` says so.

    Returns:
        The processes of each node.
    """
    sharing = {need.request.shares_gpus_of: need for need in needs if need.request.shares_gpus_of is not None}
    together: list[list[Process]] = []
    for need in needs:
        if need.request.shares_gpus_of is None:
            members = [need, *([sharing[need.request.role]] if need.request.role in sharing else [])]
            together += [[Process(each, index) for each in members] for index in range(need.request.settings.replicas)]
    together.sort(key=lambda each: -each[0].need.request.settings.gpus)
    placed: list[list[Process]] = [[] for _ in nodes]
    free = [[node.cpus, node.gpus] for node in nodes]
    for processes in together:
        cpus = sum(each.need.request.settings.cpus for each in processes)
        asked = (cpus, processes[0].need.request.settings.gpus)
        fitting = [
            number for number, left in enumerate(free) if all(a <= b + 1e-9 for a, b in zip(asked, left, strict=True))
        ]
        if fitting:
            number = min(fitting, key=lambda each: len(placed[each])) if "SPREAD" in strategy else fitting[0]
            placed[number] += processes
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
        if need.request.shares_gpus_of is not None:
            _check_beside_engine(findings, need, needs, min(memories))
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in memory.device.items() if size)
        found = f"{size_text(memory.device_bytes)} of {size_text(allowed)} on its GPU ({parts})"
        if memory.device_bytes <= allowed:
            findings.ok(need.request.key, found)
        else:
            kind = need.request.key.rpartition(".")[2]
            findings.change(key, found, _LESS_GPU_MEMORY.get(kind, "a smaller model, or another dtype"))


def _check_beside_engine(findings: Findings, need: Need, needs: Sequence[Need], gpu_bytes: int) -> None:
    """See that what a learner keeps while the engine on its GPU is awake fits beside the engine's share."""
    [engine] = [each.request for each in needs if each.request.role == need.request.shares_gpus_of]
    assert need.memory is not None, "seen before"
    assert isinstance(engine.settings, GeneratorSettings), "only engines sleep"
    kept = sum(size for name, size in need.memory.device.items() if name not in _WHILE_TRAINING)
    left = (1 - engine.settings.gpu_memory_utilization) * gpu_bytes
    if kept > left:
        findings.change(
            f"{engine.key}.gpu_memory_utilization",
            f"{engine.settings.gpu_memory_utilization:g}, which leaves {size_text(left)}, and "
            f"{need.request.key} keeps {size_text(kept)} on the same GPU while the engine is awake (generator.sleep)",
            f"at most {max(1 - kept / gpu_bytes, 0.0):.2f}, or zero_stage: 3 over more replicas",
        )


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
    findings: Findings, needs: Sequence[Need], settings: CheckpointSettings, free: Mapping[str, int], there: int = 0
) -> None:
    """See that the checkpoints have room: one more than are kept is there while it is written, and with
    `checkpoint.copy_to` another one while it is copied.

    Args:
        free: bytes by node, where the runs' folder is.
        there: checkpoints that the run has already.
    """
    checkpoint, exported = sum(need.checkpoint for need in needs), sum(need.exported for need in needs)
    if not checkpoint or not free:
        return
    # With copies, the one that is on its way stays too.
    most = settings.keep + (1 if settings.copy_to is None else 2)
    more, [address, least] = max(most - there, 0), min(free.items(), key=lambda each: each[1])
    needed = checkpoint * more + exported
    count = f"{more} more checkpoints" if there else f"{settings.keep} + {most - settings.keep} checkpoints"
    found = (
        f"{size_text(needed)} for {count} of {size_text(checkpoint)} and {size_text(exported)} of models; "
        f"{size_text(least)} are free on {address}"
    )
    if needed > least:
        findings.change("checkpoint.keep", found, "fewer checkpoints, or paths.runs on a larger disk")
    else:
        findings.ok("disk", found)
