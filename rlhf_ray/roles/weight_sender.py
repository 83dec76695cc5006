"""The sending end of vLLM's own NCCL transport, around a DeepSpeed engine. For GPUs; imported only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.models.adapters import PlainWeight
from rlhf_ray.models.token_models import gathered, named_as_saved, shapes_as_saved


class LearnerWeightSource(WeightSource):
    """Weights in full, one after another, adapters merged in; ZeRO-3 gathers each on all ranks.

    vLLM's own `ModuleSource` knows DTensors, not DeepSpeed's partitions.

    Args:
        model: the transformers model.
        weights: of it, by name.
    """

    def __init__(self, model: Any, weights: Mapping[str, PlainWeight]) -> None:
        self._model, self._weights = model, weights

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(saved, tensor.dtype, tuple(tensor.shape))
            for name, weight in self._weights.items()
            for saved, tensor in shapes_as_saved(self._model, name, weight.parameter)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._weights.items():
            with gathered(weight.parts, read_only=True):
                yield from named_as_saved(self._model, name, weight.value())


class _DriverAsksTheEngines:
    """vLLM's `VLLMWeightSyncClient` without a call of its own.

    The driver asks both sides and waits for them together. If the sender asked the engines, an engine that fails before
    it joins the broadcast would leave the sender waiting in it, and nobody would hear of the failure.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def open_sender(source: LearnerWeightSource, rank: int, group: Mapping[str, Any]) -> Any:
    """Meet the engines. All learner ranks call it; rank 0 sends.

    Args:
        group: `NCCLTrainerInitInfo` without the rank.
    """
    info = NCCLTrainerInitInfo(rank=rank, **group)
    return WeightTransferTrainerFactory.trainer_init(info, client=_DriverAsksTheEngines(), source=source)


def update_info(source: LearnerWeightSource) -> dict[str, Any]:
    """`NCCLWeightTransferUpdateInfo` of one broadcast, the same each time."""
    metadata = source.metadata()
    return {
        "names": [meta.name for meta in metadata],
        "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metadata],
        "shapes": [list(meta.shape) for meta in metadata],
    }
