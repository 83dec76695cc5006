"""How large a model is, from its configuration alone: nothing is loaded, parameters have no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.models.adapters import add_adapters, plain_weights
from rlhf_ray.models.loading import train_only_top_layers

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_KINDS = {
    "CausalLM": "AutoModelForCausalLM",
    "SequenceClassification": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}


@dataclass(frozen=True)
class ModelSize:
    """Numbers that a model's memory follows from.

    Attributes:
        parameters: all of them, tied ones once.
        trained: of these, or of its adapters.
        published: those that an engine with the model's directory is sent with every version.
        layers: transformer layers.
        trained_layers: those whose activations are kept for the backward pass.
        hidden: size of the hidden states.
        intermediate: size inside the MLP, of all experts that a token goes through.
        heads: of attention.
        head_size: of each.
        kv_heads: heads of keys and values.
        vocabulary: rows of the output projection.
        tied: the output projection is the embedding.
    """

    parameters: int
    trained: int
    published: int
    layers: int
    trained_layers: int
    hidden: int
    intermediate: int
    heads: int
    head_size: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def projection(self) -> int:
        """Parameters of the output projection."""
        return self.vocabulary * self.hidden

    def kv_bytes(self, item_bytes: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * item_bytes


def read_model_size(
    model: str,
    *,
    head: Literal["CausalLM", "SequenceClassification", "none"] = "CausalLM",
    trained_top_layers: int | None = None,
    lora: LoraSettings | None = None,
) -> ModelSize:
    """Build a model without storage, as a role would build it, and count.

    Args:
        model: Hugging Face directory or hub id, whose configuration has been read and checked.
        head: `none`: the backbone alone, as of a critic, whose head is next to nothing.
        trained_top_layers: None: all parameters are trained.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = getattr(transformers, _KINDS[head]).from_config(config)
        train_only_top_layers(network, trained_top_layers)
        if lora is not None:
            add_adapters(network, lora, "lora", seed=0)
    text = config.get_text_config()
    layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        trained=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        published=sum(weight.parameter.numel() for weight in plain_weights(network).values() if weight.is_sent),
        layers=layers,
        trained_layers=layers if trained_top_layers is None else min(trained_top_layers, layers),
        hidden=int(text.hidden_size),
        intermediate=_intermediate(text),
        heads=heads,
        head_size=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=int(text.vocab_size),
        tied=bool(config.tie_word_embeddings),
    )


def _intermediate(config: Any) -> int:
    """GPT-2 and its like name no size; a token of a mixture goes through some of the experts."""
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
    size = next((int(value) for name in names if (value := getattr(config, name, None))), 4 * int(config.hidden_size))
    return size * int(getattr(config, "num_experts_per_tok", None) or 1)
