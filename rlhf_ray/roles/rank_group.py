"""What engines that train and frozen engines share: a place among the ranks of a role, which make every pass together.

ZeRO-3 gathers each layer's weights from all ranks, so a forward pass is a collective: every rank makes as many, in the
same order. A rank with less to do repeats its last batch and drops the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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
    """Join the role's process group (`nccl` on GPUs, `gloo` on CPUs), once a process."""
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
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


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
