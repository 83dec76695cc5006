"""A model that is never trained: on a device of its own, or spread over the ranks of a group (DeepSpeed ZeRO-3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf_ray.models.loading import restore_rotary_frequencies
from rlhf_ray.roles.rank_group import Rank, RankEngine

Module = TypeVar("Module", bound=torch.nn.Module)


class FrozenEngine(RankEngine):
    """Forward passes of one frozen module. With a rank, every pass is a collective.

    Args:
        build: makes the module (with a rank it is called where parameters are partitioned as they are loaded).
        rank: this process's place among those that share the weights; None where it holds all of them.
        on_gpu: where it computes.
        dtype: compute type by name, already resolved.
    """

    def __init__(self, build: Callable[[], Module], rank: Rank | None, on_gpu: bool, dtype: str) -> None:
        super().__init__(rank, on_gpu)
        if rank is None:
            with self.device:  # straight onto it, without a copy in host memory
                module = build()
            self.module = module.eval()
            return
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        configuration = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == "bfloat16"},
            "steps_per_print": 1 << 30,
        }
        # transformers partitions while it loads as long as this object is alive.
        self._partitioned_loading = HfDeepSpeedConfig(configuration)
        # Without an optimizer: DeepSpeed then only gathers weights and frees them again.
        module = build().requires_grad_(False)
        restore_rotary_frequencies(module)
        self.module, _, _, _ = deepspeed.initialize(model=module, config=configuration, dist_init_required=False)

    @property
    def is_sharded(self) -> bool:
        """The weights are spread over several ranks."""
        return self.rank.world_size > 1
