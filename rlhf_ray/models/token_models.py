"""Models that say something about every response token of a packed row: its log-probability, or its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rlhf_ray.models.packing import PackedBatch
from rlhf_ray.models.token_loss import ChunkedHead, Objective


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

    def forward(self, batch: PackedBatch, objective: Objective | None = None) -> Any:
        """Log-probabilities of `batch.targets`, or an objective of them.

        Only the predicted positions reach the output projection, whose cost grows with the vocabulary.

        Returns:
            Without an objective, `[R]` float32 log-probs in nats, without gradient. With one, `(loss, logprobs,
            entropies)`: the objective's sum over the tokens, which alone carries a gradient, and `[R]` float32 each.
        """
        inputs = {**batch.model_inputs(), "logits_to_keep": batch.predict_at}
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


class CriticModel(nn.Module):
    """A token classifier with one label: the expected return after each position (its label is the value)."""

    def __init__(self, token_classifier: Any) -> None:
        super().__init__()
        self.token_classifier = token_classifier

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """`[R]` float32 values of the states in which the predicted tokens were chosen."""
        outputs = self.token_classifier(**batch.model_inputs())
        return outputs.logits[0, batch.predict_at, 0].float()


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

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=attention)
    return PolicyModel(loaded, temperature, float32_logits)


def load_critic_model(model: str, *, dtype: str, attention: str, seed: int) -> CriticModel:
    """A critic on the backbone of any causal language model; its head starts at zero, so first values are 0."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(model)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    loaded = AutoModelForTokenClassification.from_pretrained(
        model, config=config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    with gathered(list(loaded.score.parameters())):
        for parameter in loaded.score.parameters():
            nn.init.zeros_(parameter)
    return CriticModel(loaded)


def gathered(parameters: list[nn.Parameter], read_only: bool = False) -> AbstractContextManager[None]:
    """Parameters in full for the length of a block; ZeRO-3 has them in pieces otherwise.

    Args:
        read_only: the block changes nothing; otherwise rank 0 sends everything to all ranks again at the end.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=None if read_only else 0)
