"""A sequence classifier in training: many short texts in one row, without padding where the architecture allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rlhf_ray.models.packing import RowBounds
from rlhf_ray.models.products import product_of_rare_shape
from rlhf_ray.reward.core.loading import pad_texts

_ROW_STEP = 64
_READ_STEP = 16
"""On a CPU, tokens of a packed row and texts read from it come in multiples of these: matrix products of few rows take
other kernels, which sum in another order, and a score would depend on how many texts share the row."""
_PADDED_PARTS = 4
"""Passes that a padded micro-batch is cut into by length, so that a short text is not padded to the longest."""


def takes_packed_rows(classifier: Any) -> bool:
    """Whether a row of several texts can be read: decoders, at each text's last token, and BERT, at its first."""
    return hasattr(classifier, "score") or classifier.config.model_type == "bert"


class RewardNetwork(nn.Module):
    """Logits of texts, from a packed row or from padded batches.

    There are as many passes through the classifier whatever the texts, because in ZeRO-3 each is a collective.

    Args:
        network: an `AutoModelForSequenceClassification`, with adapters or without.
        pad_token_id: of its tokenizer.
        packed: use packed rows; its attention must be one that takes them.
    """

    def __init__(self, network: Any, pad_token_id: int, packed: bool) -> None:
        super().__init__()
        self.network = network
        self._pad_token_id = pad_token_id
        self.packed = packed

    def forward(self, texts: Sequence[Sequence[int]], one_batch: bool = False) -> tuple[torch.Tensor, int]:
        """`[n, labels]` float32 logits, and how many tokens went through the model, padding included.

        Args:
            one_batch: where rows are not packed, pad all texts to the longest.
        """
        if self.packed:
            return self._from_row(texts)
        return self._from_batch(texts) if one_batch else self._from_batches(texts)

    def _from_row(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        classifier = self.network
        device = classifier.device
        num_tokens = sum(len(text) for text in texts)
        row_step, read_step = (_ROW_STEP, _READ_STEP) if device.type == "cpu" else (1, 1)
        # Filled up by a text of padding, which nobody reads; bfloat16 kernels are compiled for each shape besides.
        filling = -num_tokens % row_step
        row_texts = [*texts, [self._pad_token_id] * filling] if filling else texts
        bounds = RowBounds([len(text) for text in row_texts])
        read = [*range(len(texts)), *[0] * (-len(texts) % read_step)]
        row = torch.tensor([token for text in row_texts for token in text], device=device)[None]
        inputs = {"input_ids": row, "position_ids": bounds.position_ids().to(device), **bounds.model_inputs(device)}
        if hasattr(classifier, "score"):
            hidden = classifier.base_model(**inputs, use_cache=False).last_hidden_state[0]
            return classifier.score(hidden[bounds.starts[1:][read] - 1])[: len(texts)].float(), row.numel()
        inputs["token_type_ids"] = torch.zeros_like(row)
        if torch.is_grad_enabled():
            first = classifier.bert(**inputs).last_hidden_state[0, bounds.starts[read]]
        else:
            first = _first_hidden_states(classifier.bert, inputs, bounds.starts, read)
        pooled = classifier.bert.pooler(first[:, None])
        return classifier.classifier(classifier.dropout(pooled))[: len(texts)].float(), row.numel()

    def _from_batches(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        parts = [part.tolist() for part in np.array_split(np.array(order), _PADDED_PARTS)]
        # A part without texts takes one along, for the pass, and drops it.
        passes = [self._from_batch([texts[index] for index in part or order[:1]]) for part in parts]
        logits = [each[: len(part)] for (each, _), part in zip(passes, parts, strict=True)]
        place = torch.tensor(order, device=logits[0].device).argsort()
        return torch.cat(logits)[place], sum(num_tokens for _, num_tokens in passes)

    def _from_batch(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        batch = pad_texts(texts, self._pad_token_id)
        inputs = {name: tensor.to(self.network.device) for name, tensor in batch.items()}
        return self.network(**inputs).logits.float(), batch["input_ids"].numel()


def _first_hidden_states(
    bert: Any, inputs: dict[str, Any], starts: NDArray[np.int64], read: Sequence[int]
) -> torch.Tensor:
    """`[n, hidden]` the last hidden state of the first token of the n sequences that are read.

    Of the last layer only keys and values are computed for the other tokens: a seventh of the work of six layers.

    Args:
        bert: without dropout, with the attention of packed rows.
        inputs: of the row, as the model takes them.
        starts: of all sequences of the row, with the total at the end.
        read: numbers of those that are read.
    """
    bounds = {name: value for name, value in inputs.items() if name.startswith(("cu_seq", "max_length"))}
    names = ("input_ids", "position_ids", "token_type_ids")
    hidden = bert.embeddings(**{name: inputs[name] for name in names})
    *layers, last = bert.encoder.layer
    for layer in layers:
        hidden = layer(hidden, **bounds)
    attention = last.attention.self
    first = hidden[:, starts[read]]

    def heads(projection: Any, states: torch.Tensor) -> torch.Tensor:
        return projection(states)[0].float().unflatten(-1, (-1, attention.attention_head_size)).transpose(0, 1)

    queries = heads(attention.query, first).split(1, dim=1)
    keys, values = (heads(each, hidden) for each in (attention.key, attention.value))
    attended = []
    for query, number in zip(queries, read, strict=True):
        own = slice(starts[number], starts[number + 1])
        weights = (product_of_rare_shape(query, keys[:, own].transpose(-1, -2)) * attention.scaling).softmax(-1)
        attended.append(product_of_rare_shape(weights, values[:, own]))
    joined = torch.cat(attended, dim=1).transpose(0, 1).flatten(1).to(hidden.dtype)[None]
    states: torch.Tensor = last.feed_forward_chunk(last.attention.output(joined, first))[0]
    return states
