"""The sending end of vLLM's own NCCL transport, around a DeepSpeed engine. For GPUs; imported only there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.models.token_models import gathered


class LearnerWeightSource(WeightSource):
    """A module's weights in full, one after another; ZeRO-3 gathers each on all ranks.

    vLLM's own `ModuleSource` knows DTensors, not DeepSpeed's partitions.

    Args:
        module: as the engine holds it.
        strip: prefix before the Hugging Face names.
    """

    def __init__(self, module: torch.nn.Module, strip: str) -> None:
        self._module, self._strip = module, strip

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(
                name.removeprefix(self._strip), parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape))
            )
            for name, parameter in self._module.named_parameters()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._module.named_parameters():
            with gathered([parameter], read_only=True):
                yield name.removeprefix(self._strip), parameter.data


def open_sender(source: LearnerWeightSource, client: Any, rank: int, address: str, port: int, world_size: int) -> Any:
    """Meet the engines. All learner ranks call it; rank 0 sends.

    Args:
        client: reaches the engines, vLLM's `VLLMWeightSyncClient`.
        world_size: the sender and all engine workers.
    """
    info = NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
