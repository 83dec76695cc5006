"""What engines that train and frozen engines share: a place among the ranks of a role, which make every pass together.

ZeRO-3 gathers each layer's weights from all ranks, so a forward pass is a collective: every rank makes as many, in the
same order. A rank with less to do repeats its last batch and drops the result.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf_ray.models.products import prefer_onednn

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rank:
    """A process's place in its group, and where the group meets."""

    rank: int
    world_size: int
    master_address: str
    master_port: int


def join_group(rank: Rank, on_gpu: bool) -> None:
    """Join the role's process group (`nccl` on GPUs, `gloo` on CPUs), once a process.

    The group meets at its first rank's address and listens nowhere else: left to itself, torch's store, which asks
    nobody for a token, listens on every interface.
    """
    os.environ.update(
        RANK=str(rank.rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(rank.world_size),
        MASTER_ADDR=rank.master_address,
        MASTER_PORT=str(rank.master_port),
    )
    import deepspeed
    import deepspeed.ops

    if not on_gpu:
        # A shared-memory all-reduce that would be compiled at the first start (~40 s); gloo serves as well for
        # the few ranks that a CPU machine has.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        return
    if ipaddress.ip_address(rank.master_address).is_loopback:
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    backend = "nccl" if on_gpu else "gloo"
    timeout = deepspeed.constants.default_pg_timeout
    dist.init_process_group(
        backend, store=_meeting_store(rank, timeout), rank=rank.rank, world_size=rank.world_size, timeout=timeout
    )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _meeting_store(rank: Rank, timeout: timedelta) -> dist.TCPStore:
    """The store of a group; its first rank serves it."""
    listener = None
    if rank.rank == 0:
        family = socket.AF_INET6 if ":" in rank.master_address else socket.AF_INET
        with socket.create_server((rank.master_address, rank.master_port), family=family) as server:
            listener = server.detach()
    return dist.TCPStore(
        rank.master_address,
        rank.master_port,
        rank.world_size,
        rank.rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
    )


class RankEngine:
    """One rank's engine. Every method is a collective: all ranks of the group call it together.

    A subclass sets `module`, what to call in a forward pass.

    Args:
        rank: this process; None for a process that is on its own and joins no group.
        on_gpu: where it computes.
    """

    module: Any

    def __init__(self, rank: Rank | None, on_gpu: bool) -> None:
        if rank is not None:
            join_group(rank, on_gpu)
        self.rank = rank or Rank(0, 1, "", 0)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            prefer_onednn()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a float64 vector over the ranks, in rank order whatever their timing."""
        return self._of_all_ranks(values).sum(0)

    def all_max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest of each entry of a float64 vector over the ranks."""
        return self._of_all_ranks(values).amax(0)

    def most(self, count: int) -> int:
        """The largest count of any rank."""
        return int(self.all_max(torch.tensor([count], dtype=torch.float64))[0])

    def _of_all_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self.rank.world_size == 1:
            return values[None]
        local = values.to(self.device, torch.float64)
        parts = [torch.empty_like(local) for _ in range(self.rank.world_size)]
        dist.all_gather(parts, local)
        return torch.stack(parts).to(values.device)

    def forward_each(self, batches: Sequence[Batch], forward: Callable[[Batch], Result]) -> list[Result]:
        """Results of a forward pass over this rank's batches, without gradients."""
        self.module.eval()
        with torch.no_grad():
            results = [forward(batch) for batch, _ in self.common_rounds(batches)]
        return results[: len(batches)]

    def common_rounds(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Each batch, and the last one again, marked as not real, until all ranks have had as many."""
        if not batches:
            raise ValueError("a rank needs at least one sample in every round")
        for index in range(self.most(len(batches))):
            yield batches[min(index, len(batches) - 1)], index < len(batches)
