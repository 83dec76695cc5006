"""The receiving end of the `object_store` transport: a weight-transfer engine registered with vLLM.

CPU linear layers prepack their weights when the model is loaded, so writing into the parameters afterwards changes
nothing that is computed. Loading happens inside vLLM's layerwise reload, which packs them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rlhf_ray.models.buckets import Snapshot

BACKEND = "object_store"


@dataclass
class InitInfo:
    """Nothing needs to be agreed on beforehand."""


@dataclass
class UpdateInfo:
    """All trained weights of one version."""

    snapshot: Snapshot


class ObjectStoreWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads snapshots from the object store."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """There is no connection to open."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self._old_kernels = _take_expert_kernels(self.model) if current_platform.is_cpu() else {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator here, which a CPU does not have; loading is synchronous.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            # vLLM considers the update over. Left open, the reload would take up the next weights halfway.
            self.finish_weight_update()
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(update_info.snapshot.tensors())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._old_kernels.items():
            method.moe_kernel = method.moe_kernel or kernel
        _process_tied_layers(self.model)

    def shutdown(self) -> None:
        """There is no connection to close."""


def _take_expert_kernels(model: nn.Module) -> dict[Any, Any]:
    """Take the kernels out of mixture-of-experts layers, so that their weights are packed again.

    vLLM 0.32 packs experts for a CPU only while a layer has no kernel; with one, it would copy plain weights to where
    the kernel expects packed ones.

    Returns:
        The kernel of each layer's method, for the layers that no new weights arrive for.
    """
    kernels: dict[Any, Any] = {}
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            kernels[method], method.moe_kernel = method.moe_kernel, None
    return kernels


def _process_tied_layers(model: nn.Module) -> None:
    """Pack again what layers have made of a parameter that belongs to another layer.

    An output projection tied to the embedding shares its parameter but keeps a packed copy of its own. The weights
    arrive under the embedding's name, so a layerwise reload (vLLM 0.32) processes the embedding alone, and the
    projection would go on computing with its old copy.
    """
    owned: set[int] = set()
    for layer in model.modules():
        parameters = {id(parameter) for parameter in layer.parameters(recurse=False)}
        method = getattr(layer, "quant_method", None)
        if parameters & owned and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)
        owned |= parameters


def register_object_store_engine() -> None:
    """Make `weight_transfer_config.backend = "object_store"` known to vLLM, once a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreWeightTransferEngine)
