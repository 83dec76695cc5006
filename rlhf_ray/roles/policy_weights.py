"""The policy learner's trained weights on their way to the engines. Every method is a collective of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.models.buckets import WeightBucket, bucket_names
from rlhf_ray.models.token_models import gathered, named_as_saved, shapes_as_saved
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine


class PolicyWeights:
    """Weights under their Hugging Face names, in the compute type. Frozen ones are in the model's directory and stay.

    Args:
        engine: trains the policy.
        model: the transformers model inside its module.
    """

    def __init__(self, engine: DeepSpeedEngine, model: Any) -> None:
        self._engine, self._model = engine, model
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
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
        return [
            tuple(saved for name in names for saved, _ in shapes_as_saved(self._model, name, self._trained[name]))
            for names in self._layout
        ]

    def bucket(self, index: int) -> WeightBucket | None:
        """One bucket; nothing on ranks other than the first."""
        names = self._layout[index]
        parameters = [self._trained[name] for name in names]
        with gathered(parameters, read_only=True), torch.no_grad():
            if self._engine.rank.rank != 0:
                return None
            # What ZeRO-3 gathers is gone with the block.
            tensors = [each.clone() if hasattr(each, "ds_id") else each.data for each in parameters]
            return WeightBucket.of(
                saved
                for name, tensor in zip(names, tensors, strict=True)
                for saved in named_as_saved(self._model, name, tensor)
            )

    def open_sender(self, group: dict[str, Any]) -> dict[str, Any]:
        """Meet the engines in the group of vLLM's NCCL transport.

        Args:
            group: `NCCLTrainerInitInfo` without the rank.

        Returns:
            What the engines must be told of each broadcast.
        """
        from rlhf_ray.roles.weight_sender import LearnerWeightSource, open_sender, update_info

        source = LearnerWeightSource(self._model, self._trained)
        self._sender = open_sender(source, self._engine.rank.rank, group)
        return update_info(source)

    def broadcast(self) -> None:
        """Send all weights to the engines that are waiting for them."""
        self._sender.send_weights()
