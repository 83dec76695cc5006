"""Low-rank adapters (Hu et al. 2021) with `peft`, and the plain weights that they become."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.config.reward_model import LoraSettings

_ADAPTER = "default"
_PREFIX = "base_model.model."


def add_adapters(network: Any, settings: LoraSettings) -> Any:
    """A sequence classifier whose backbone is frozen behind adapters; its head is trained in full."""
    from peft import LoraConfig, TaskType, get_peft_model

    configuration = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.modules or "all-linear",
    )
    return get_peft_model(network, configuration, adapter_name=_ADAPTER)


def merged_weights(state: dict[str, torch.Tensor], settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Weights of the network without adapters, `W + alpha / rank · B A`, under its own names.

    Written out rather than asked of `peft`, because with ZeRO-3 no process has a whole network to ask, only its
    weights.

    Args:
        state: of the network with adapters, in full.
    """
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix(_PREFIX)
        if ".lora_" in plain or ".original_module." in plain:
            continue
        if ".modules_to_save." in plain:
            plain = plain.replace(f".modules_to_save.{_ADAPTER}", "")
        elif ".base_layer." in plain:
            stem, _, kind = name.rpartition(".base_layer.")
            plain = plain.replace(".base_layer", "")
            if kind == "weight":
                down, up = (state[f"{stem}.lora_{side}.{_ADAPTER}.weight"].double() for side in "AB")
                tensor = (tensor.double() + settings.alpha / settings.rank * (up @ down)).to(tensor.dtype)
        merged[plain] = tensor
    return merged
