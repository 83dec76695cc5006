"""Reward models as Hugging Face directories, and how they are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import NO_CODE, SAFE_WEIGHTS, ModelFacts, load_tokenizer
from rlhf_ray.reward.core.card import RewardModelCard

_LENGTH_STEP = 8
_HEADS = ("classifier.", "score.")


def padded_width(num_tokens: int) -> int:
    """The next multiple of 8, so that few shapes (and their kernels) occur."""
    return -(-num_tokens // _LENGTH_STEP) * _LENGTH_STEP


def pad_texts(token_ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of `[B, L]` with L a multiple of 8, padded behind the texts."""
    width = padded_width(max(len(ids) for ids in token_ids))
    ids = torch.full((len(token_ids), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(token_ids), width, dtype=torch.int64)
    for row, text in enumerate(token_ids):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def load_reward_tokenizer(model: str, key: str) -> Any:
    """A tokenizer whose padding cannot be taken for the end of the text.

    Raises:
        BadInput: pad and end of sequence are the same token: the score would be read one token off.
    """
    tokenizer = load_tokenizer(model, key)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadInput(
            key,
            f"the tokenizer of '{model}' has no padding token of its own (pad {tokenizer.pad_token_id}, eos "
            f"{tokenizer.eos_token_id}); a score would be read at the wrong token",
            "a tokenizer whose pad_token differs from its eos_token",
        )
    return tokenizer


def check_reward_model(facts: ModelFacts, card: RewardModelCard | None, model: str, key: str) -> None:
    """See that a directory is a classifier with the labels that its card, or nothing, makes one expect.

    Raises:
        BadInput: it is not.
    """
    if not any("SequenceClassification" in name for name in facts.architectures):
        raise BadInput(
            key,
            f"'{model}' is a {', '.join(facts.architectures) or 'model without a named architecture'}; its "
            "scoring head would be randomly initialised",
            "an AutoModelForSequenceClassification directory (see `rlhf-ray train-rm`)",
        )
    labels = card.layout.num_labels if card else 1
    if facts.num_labels != labels:
        allowed = f"{labels}, as its card says" if card else "a reward model with one label"
        raise BadInput(key, f"'{model}' has {facts.num_labels} labels", allowed)


def load_reward_network(
    model: str,
    *,
    dtype: str,
    pad_token_id: int,
    attention: str,
    num_labels: int = 1,
    new_head: bool = False,
    dropout: float | None = None,
) -> Any:
    """An `AutoModelForSequenceClassification`.

    Args:
        dtype: a torch type by name, already resolved.
        pad_token_id: of the tokenizer that goes with it.
        attention: an attention that takes padded batches, already resolved.
        num_labels: of its head.
        new_head: begin with a new head. Otherwise the weights must hold one: transformers would make it up.
        dropout: of the backbone in training; None leaves the model's own.

    Raises:
        BadInput: weights are missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model, **NO_CODE)
    if not new_head:
        config.num_labels = num_labels
    config.pad_token_id = pad_token_id
    if dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout"):
            if name in config.to_dict():
                setattr(config, name, dropout)
    network, loading = AutoModelForSequenceClassification.from_pretrained(
        model,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
        **SAFE_WEIGHTS,
    )
    made_up = sorted(loading["missing_keys"])
    if made_up and not new_head:
        raise BadInput(
            "reward.model",
            f"'{model}' has no weights for {', '.join(made_up[:3])}; transformers would make them up at random",
            "a reward model whose scoring head was saved with it",
        )
    if config.num_labels != num_labels:
        # Not left to the loading, which refuses a saved head of another size where ZeRO-3 partitions.
        _renew_head(network, num_labels, config)
    return network


def _renew_head(network: Any, num_labels: int, config: Any) -> None:
    """Put a new last layer with so many labels in the place of the head's."""
    parent, name = network, "classifier" if hasattr(network, "classifier") else "score"
    if hasattr(head_of(network), "out_proj"):  # a head of several layers, as RoBERTa's
        parent, name = head_of(network), "out_proj"
    old = getattr(parent, name)
    new = torch.nn.Linear(old.in_features, num_labels, bias=old.bias is not None, dtype=old.weight.dtype)
    torch.nn.init.normal_(new.weight, std=config.initializer_range)
    if new.bias is not None:
        torch.nn.init.zeros_(new.bias)
    setattr(parent, name, new)
    network.config.num_labels = network.num_labels = num_labels


def head_of(network: Any) -> Any:
    """The module that turns the last hidden state into labels."""
    return network.classifier if hasattr(network, "classifier") else network.score


def written_head_hash(folder: Path) -> str:
    """The `head_hash` of what a directory holds."""
    head: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            head |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(_HEADS)}  # noqa: SIM118
    return head_hash(head)


def head_hash(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of the head's weights in float32, from a network's state or what was loaded of it.

    Args:
        state: of the whole network, by transformers' names.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        if name.startswith(_HEADS):
            own = name.partition(".")[2]
            digest.update(own.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
