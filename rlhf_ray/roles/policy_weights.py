"""The policy learner's trained weights on their way to the engines, with adapters merged in.

Every method is a collective of all ranks.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.models.adapters import plain_weights
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
        self._weights = {name: weight for name, weight in plain_weights(model).items() if weight.is_sent}
        self._layout: list[tuple[str, ...]] = []
        self._sender: Any = None

    def lay_out(self, max_bytes: int) -> list[tuple[str, ...]]:
        """Cut the weights into buckets of at most `max_bytes` (a larger tensor is alone).

        Returns:
            The names in each bucket.
        """
        sizes = [
            (name, getattr(weight.parameter, "ds_numel", weight.parameter.numel()) * weight.parameter.element_size())
            for name, weight in self._weights.items()
        ]
        self._layout = bucket_names(sizes, max_bytes)
        return [
            tuple(
                saved
                for name in names
                for saved, _ in shapes_as_saved(self._model, name, self._weights[name].parameter)
            )
            for names in self._layout
        ]

    def bucket(self, index: int) -> WeightBucket | None:
        """One bucket; nothing on ranks other than the first."""
        names = self._layout[index]
        weights = [self._weights[name] for name in names]
        with gathered([part for weight in weights for part in weight.parts], read_only=True):
            if self._engine.rank.rank != 0:
                return None
            # What ZeRO-3 gathers is gone with the block.
            tensors = [
                weight.value().clone() if hasattr(weight.parameter, "ds_id") else weight.value() for weight in weights
            ]
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

        source = LearnerWeightSource(self._model, self._weights)
        self._sender = open_sender(source, self._engine.rank.rank, group)
        return update_info(source)

    def broadcast(self) -> None:
        """Send all weights to the engines that are waiting for them."""
        self._sender.send_weights()
