"""Models that say something about every response token of a packed row: its log-probability, or its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rlhf_ray.models.loading import NO_CODE, SAFE_WEIGHTS, frozen_layers
from rlhf_ray.models.packing import PackedBatch
from rlhf_ray.models.token_loss import ChunkedHead, Objective
from rlhf_ray.models.trunk import FrozenTrunk


class PolicyModel(nn.Module):
    """A causal language model that gives log-probabilities of the tokens that were sampled, and a loss of them.

    Args:
        language_model: any `AutoModelForCausalLM`.
        temperature: logits are divided by it, as the engine did when it sampled.
        float32_logits: compute the output projection in float32 whatever the type of the weights.
    """

    def __init__(self, language_model: Any, temperature: float = 1.0, float32_logits: bool = True) -> None:
        super().__init__()
        self.language_model = language_model
        self._head = ChunkedHead(language_model, temperature, float32_logits)
        self._trunk: FrozenTrunk | None = None

    def cut_above(self, trained_layers: int) -> None:
        """Keep the layers below the trained ones apart, so that a pass can begin or end behind them.

        Args:
            trained_layers: from the top; fewer than there are.
        """
        self._trunk = FrozenTrunk(frozen_layers(self.language_model, trained_layers))

    def trunk_states(self, batch: PackedBatch, *, to_the_end: bool = False) -> torch.Tensor:
        """`[T, H]` hidden states behind the frozen layers, in the order of the row.

        Args:
            to_the_end: see `FrozenTrunk.states`.
        """
        assert self._trunk is not None, "cut_above comes first"
        inputs = {**batch.model_inputs(), "logits_to_keep": batch.predict_at[:1]}  # in case it comes to logits
        states = self._trunk.states(lambda: self.language_model(**inputs), to_the_end=to_the_end)
        return states[0, : batch.input_ids.shape[1]]

    def forward(self, batch: PackedBatch, objective: Objective | None = None) -> Any:
        """Log-probabilities of `batch.targets`, or an objective of them.

        Only the predicted positions reach the output projection, whose cost grows with the vocabulary.

        Returns:
            Without an objective, `[R]` float32 log-probs in nats, without gradient. With one, `(loss, logprobs,
            entropies)`: the objective's sum over the tokens, which alone carries a gradient, and `[R]` float32 each.
        """
        inputs = {**batch.model_inputs(), "logits_to_keep": batch.predict_at}
        with begun_behind(self._trunk, batch):
            return self._head(self.language_model, inputs, batch.targets, objective)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Log-probs at another temperature than the sampling's, for the length of a block."""
        usual = self._head.transform
        self._head.transform = replace(usual, temperature=temperature)
        try:
            yield
        finally:
            self._head.transform = usual


class ValueHead(nn.Linear):
    """A linear layer that computes in float32, whatever the type of its weights and of what it is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class CriticModel(nn.Module):
    """A language model's backbone with a value head: the expected return after each position.

    Args:
        backbone: any `AutoModel` whose last hidden states are those of a causal language model.
        value_head: `hidden -> 1`.
    """

    def __init__(self, backbone: Any, value_head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = value_head
        self._trunk: FrozenTrunk | None = None

    def cut_above(self, trained_layers: int) -> None:
        """As `PolicyModel.cut_above`."""
        self._trunk = FrozenTrunk(frozen_layers(self.backbone, trained_layers))

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """`[R]` float32 values of the states in which the predicted tokens were chosen."""
        with begun_behind(self._trunk, batch):
            hidden = self.backbone(**batch.model_inputs()).last_hidden_state
        return self.value_head(hidden[0, batch.predict_at])[:, 0]


def begun_behind(trunk: FrozenTrunk | None, batch: PackedBatch) -> AbstractContextManager[None]:
    """Forward passes of a row begin with its states, where it has some."""
    if batch.trunk is None:
        return nullcontext()
    if trunk is None:
        raise ValueError("the row has states to begin with, and the model is not cut")
    return trunk.begun_at(nn.functional.pad(batch.trunk, (0, 0, 0, batch.filling)))


def load_policy_model(
    model: str, *, dtype: str, attention: str, temperature: float, float32_logits: bool
) -> PolicyModel:
    """A policy from a Hugging Face directory or hub id.

    Args:
        dtype: a torch type by name, already resolved.
        attention: an attention that takes packed rows, already resolved.
        float32_logits: compute the output projection in float32.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attention, **SAFE_WEIGHTS
    )
    _remove_noise(loaded)
    return PolicyModel(loaded, temperature, float32_logits)


def load_critic_model(model: str, *, dtype: str, attention: str) -> CriticModel:
    """A critic on the backbone of any causal language model; its head starts at zero, so first values are 0.

    The directory of a reward model with one label gives its score head, too: values then start at its scores.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention, **SAFE_WEIGHTS}
    config = AutoConfig.from_pretrained(model, **NO_CODE)
    if config.num_labels == 1 and any("SequenceClassification" in name for name in config.architectures or ()):
        classifier = AutoModelForSequenceClassification.from_pretrained(model, **options)
        backbone, head = classifier.base_model, ValueHead(1, 1, bias=False)
        head.weight = classifier.score.weight
    else:
        backbone = AutoModel.from_pretrained(model, **options)
        # Not the configuration's hidden size: OPT's smaller models project their last states.
        head = ValueHead(backbone.get_input_embeddings().embedding_dim, 1, dtype=options["dtype"])
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    _remove_noise(backbone)
    return CriticModel(backbone, head)


def _remove_noise(model: nn.Module) -> None:
    """Switch dropout and the routers' jitter off, which transformers applies in training mode.

    The ratio of new to old log-probs is about the weights; with noise it is not 1 before the first update. The
    configuration stays as it is, for the directories that are written.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def named_as_saved(model: Any, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter under the names, and in the pieces, that `save_pretrained` writes and engines read.

    Transformers 5 holds some weights in another form than their checkpoints, such as all experts of a layer in one
    tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, {name: tensor}).items()


def shapes_as_saved(model: Any, name: str, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """The same without the weights: tensors on the meta device, also of a parameter that ZeRO-3 has in pieces."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return named_as_saved(model, name, torch.empty(shape, dtype=parameter.dtype, device="meta"))


def gathered(parameters: list[nn.Parameter], read_only: bool = False) -> AbstractContextManager[None]:
    """Parameters in full for the length of a block; ZeRO-3 has them in pieces otherwise.

    Args:
        read_only: the block changes nothing; otherwise rank 0 sends everything to all ranks again at the end.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=None if read_only else 0)
