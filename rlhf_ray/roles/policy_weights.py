"""The policy learner's trained weights on their way to the engines. Every method is a collective of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.models.buckets import WeightBucket, bucket_names
from rlhf_ray.models.token_models import gathered
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine


class PolicyWeights:
    """Weights under their Hugging Face names, in the compute type. Frozen ones are in the model's directory and stay.

    Args:
        engine: trains the policy.
        strip: prefix before the Hugging Face names.
    """

    def __init__(self, engine: DeepSpeedEngine, strip: str) -> None:
        self._engine, self._strip = engine, strip
        self._trained = {
            name.removeprefix(strip): parameter
            for name, parameter in engine.unwrapped.named_parameters()
            if parameter.requires_grad
        }
        self._layout: list[tuple[str, ...]] = []
        self._sender: Any = None

    def lay_out(self, max_bytes: int) -> list[tuple[str, ...]]:
        """Cut the weights into buckets of at most `max_bytes` (a larger tensor is alone).

        Returns:
            The names in each bucket.
        """
        sizes = [
            (name, getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size())
            for name, parameter in self._trained.items()
        ]
        self._layout = bucket_names(sizes, max_bytes)
        return self._layout

    def bucket(self, index: int) -> WeightBucket | None:
        """One bucket; nothing on ranks other than the first."""
        parameters = [self._trained[name] for name in self._layout[index]]
        with gathered(parameters, read_only=True), torch.no_grad():
            if self._engine.rank.rank != 0:
                return None
            # What ZeRO-3 gathers is gone with the block.
            tensors = [each.clone() if hasattr(each, "ds_id") else each for each in parameters]
            return WeightBucket.of(zip(self._layout[index], tensors, strict=True))

    def open_sender(self, group: dict[str, Any]) -> dict[str, Any]:
        """Meet the engines in the group of vLLM's NCCL transport.

        Args:
            group: `NCCLTrainerInitInfo` without the rank.

        Returns:
            What the engines must be told of each broadcast.
        """
        from rlhf_ray.roles.weight_sender import LearnerWeightSource, open_sender, update_info

        source = LearnerWeightSource(self._trained)
        self._sender = open_sender(source, self._engine.rank.rank, group)
        return update_info(source)

    def broadcast(self) -> None:
        """Send all weights to the engines that are waiting for them."""
        self._sender.send_weights()
