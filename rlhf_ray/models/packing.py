"""Sequences of different lengths in one row, without padding and without seeing each other.

`packed_sdpa` takes such rows with the arguments that transformers has for them (`cu_seq_lens_*`), as its
`flash_attention_2` does. A block-diagonal mask over the whole row would cost the square of the row's length;
`packed_sdpa` pays only for each sequence on its own. On a GPU it calls torch's own variable-length kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.attention.varlen import varlen_attn

from rlhf_ray.models.products import product_of_rare_shape
from rlhf_ray.models.trunk import states_of
from rlhf_ray.rollout import Rollout, TrunkColumn, offsets

_WIDTH_STEP = 16
"""Sequences are padded to multiples of so many tokens."""

SHORT_WIDTH = 128
"""Up to here attention on a CPU is written out: the fused kernel's backward pass takes longer, in bfloat16 many times,
and the weights that are kept for it are no larger than the other activations."""


class RowBounds:
    """Where the sequences of a packed row lie.

    Args:
        lengths: of the sequences, one after another.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self.starts = offsets(lengths)

    def position_ids(self) -> torch.Tensor:
        """`[1, T]`, starting again at 0 in each sequence."""
        return torch.from_numpy(np.concatenate([np.arange(length) for length in self._lengths]))[None]

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """What attention is told, as transformers names it."""
        starts, longest = torch.from_numpy(self.starts.astype(np.int32)).to(device), max(self._lengths)
        return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class PackedBatch:
    """One row of `T` tokens of `S` sequences, and which of its tokens are predicted.

    Attributes:
        input_ids: `[1, T]` int64.
        position_ids: `[1, T]` int64, starting again at 0 in each sequence.
        lengths: length of each sequence.
        predict_at: `[R]` int64 positions in the row whose next token is predicted (or valued).
        targets: `[R]` int64 the tokens that follow those positions.
        columns: `[R]` int64 where each predicted token stands in the caller's flat token columns.
        tokens: `[T]` int64 where each token of the row stands among all tokens of the caller.
        trunk: `[1, T, H]` hidden states to begin a forward pass with (`models/trunk.py`); None: begin at the embedding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    predict_at: torch.Tensor
    targets: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor
    trunk: torch.Tensor | None = None

    @property
    def filling(self) -> int:
        """Tokens behind the row that nobody reads: on a CPU a model is given rows of few different lengths.

        oneDNN compiles a product for each shape and keeps a thousand of them, which in the heap lie between the large
        tensors: a learner whose every row had a new length would grow for hundreds of steps. So there are at most 32
        lengths between a power of two and the next.
        """
        num_tokens = self.input_ids.shape[1]
        step = max(_WIDTH_STEP, 1 << max(num_tokens.bit_length() - 6, 0))
        return -num_tokens % step if self.input_ids.device.type == "cpu" else 0

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model, the filling included."""
        filling = self.filling
        bounds = RowBounds((*self.lengths, filling) if filling else self.lengths)
        return {
            "input_ids": F.pad(self.input_ids, (0, filling)),
            "position_ids": F.pad(self.position_ids, (0, filling)),
            **bounds.model_inputs(self.input_ids.device),
            "use_cache": False,
        }

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.lengths,
            self.predict_at.to(device),
            self.targets.to(device),
            self.columns.to(device),
            self.tokens.to(device),
            None if self.trunk is None else self.trunk.to(device),
        )


def pack(
    sequences: Sequence[NDArray[np.int32]],
    learn_from: Sequence[int],
    column_starts: Sequence[int] | None = None,
    token_starts: Sequence[int] | None = None,
) -> PackedBatch:
    """Put sequences one after another.

    Args:
        sequences: token ids, each at least 2 long.
        learn_from: for each, the first index that is predicted (at least 1).
        column_starts: for each, where its predicted tokens start in the caller's columns; one after another if empty.
        token_starts: for each, where it starts among all tokens of the caller; one after another if empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    starts = offsets(lengths)
    predicted = [length - first for length, first in zip(lengths, learn_from, strict=True)]
    places = column_starts if column_starts is not None else offsets(predicted)[:-1]
    tokens = np.concatenate(sequences).astype(np.int64)
    predict_at = np.concatenate(
        [np.arange(end - count, end) - 1 for end, count in zip(starts[1:], predicted, strict=True)]
    )
    columns = np.concatenate([np.arange(count) + place for count, place in zip(predicted, places, strict=True)])
    firsts = token_starts if token_starts is not None else starts[:-1]
    token_places = np.concatenate([np.arange(length) + first for length, first in zip(lengths, firsts, strict=True)])
    return PackedBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=RowBounds(lengths).position_ids(),
        lengths=tuple(lengths),
        predict_at=torch.from_numpy(predict_at),
        targets=torch.from_numpy(tokens[predict_at + 1]),
        columns=torch.from_numpy(columns),
        tokens=torch.from_numpy(token_places),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Split sequences, longest first, into packs of about equally many tokens, at most `max_tokens` (a longer one is
    alone). Sequences of like length share a pack, so laying a pack out as a padded batch wastes little.

    Args:
        at_least: packs, where there are so many sequences.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ordered = [lengths[index] for index in order]
    count = max(len(_cut(ordered, max_tokens)), min(at_least, len(order)))
    # The smallest limit that needs no more packs; a limit of 1 gives each sequence its own.
    low, high = 1, max([max_tokens, *ordered[:1]])
    while low < high:
        middle = (low + high) // 2
        if len(_cut(ordered, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    ends = _cut(ordered, low)
    while len(ends) < count:
        # Equal lengths can make the number of packs jump; halving the packs with most sequences fills it up.
        starts = [0, *ends[:-1]]
        widest = max(range(len(ends)), key=lambda pack: (ends[pack] - starts[pack], -pack))
        ends.insert(widest, (starts[widest] + ends[widest]) // 2)
    return [order[start:end] for start, end in pairwise([0, *ends])]


def _cut(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where packs end that take sequences in this order while there is room."""
    ends: list[int] = []
    room = 0
    for index, length in enumerate(lengths):
        if not ends or length > room:
            ends.append(index)
            room = max_tokens
        room -= length
        ends[-1] = index + 1
    return ends


class RolloutRows:
    """The samples of several rollouts, numbered through, ready to be packed.

    Token columns of the rollouts, concatenated in the same order, are `[R]` flat arrays that `PackedBatch.columns`
    points into; their tokens are those that `PackedBatch.tokens` points into.

    Args:
        trunks: hidden states that the packs begin with, for each rollout; or for none of them.
    """

    def __init__(self, rollouts: Sequence[Rollout], trunks: Sequence[TrunkColumn | None] = ()) -> None:
        states = [states_of(trunk) for trunk in trunks if trunk is not None]
        self._trunk = torch.cat(states) if states else None
        self._sequences: list[NDArray[np.int32]] = []
        self._prompt_lengths: list[int] = []
        response_lengths: list[int] = []
        self._first_sample = [0]
        for rollout in rollouts:
            starts = rollout.token_starts()
            self._sequences += [rollout.tokens[start:end] for start, end in pairwise(starts)]
            self._prompt_lengths += rollout.prompt_lengths.tolist()
            response_lengths += rollout.response_lengths.tolist()
            self._first_sample.append(len(self._sequences))
        self.column_starts = offsets(response_lengths)
        self.token_starts = offsets([len(sequence) for sequence in self._sequences])

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def num_columns(self) -> int:
        """`R`, response tokens in all."""
        return int(self.column_starts[-1])

    def samples_of(self, rollout: int) -> range:
        """Numbers of the samples of one rollout."""
        return range(self._first_sample[rollout], self._first_sample[rollout + 1])

    def count_packs(self, samples: Sequence[int], max_tokens: int) -> int:
        """How many packs the chosen samples need."""
        return len(micro_batches([len(self._sequences[sample]) for sample in samples], max_tokens))

    def pack(self, samples: Sequence[int], max_tokens: int, at_least: int = 1) -> list[PackedBatch]:
        """Packs of the chosen samples, cut as by `micro_batches`; every response token is predicted."""
        groups = micro_batches([len(self._sequences[sample]) for sample in samples], max_tokens, at_least)
        packs = [
            pack(
                [self._sequences[samples[i]] for i in group],
                [self._prompt_lengths[samples[i]] for i in group],
                [int(self.column_starts[samples[i]]) for i in group],
                [int(self.token_starts[samples[i]]) for i in group],
            )
            for group in groups
        ]
        if self._trunk is None:
            return packs
        return [replace(each, trunk=self._trunk[each.tokens][None]) for each in packs]


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed row, each sequence on its own.

    Half-precision rows on a GPU go to torch's variable-length kernel as they are (FlashAttention 2, in torch's CUDA
    build); all others are laid out as padded batches.

    Args:
        query: `[1, heads, T, head_size]`; key and value have their own number of heads, and the value its own size.
        cu_seq_lens_q: `[S + 1]` starts of the sequences, with the total at the end.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores are bent to `softcap * tanh(score / softcap)` before the softmax (Gemma 2).
        s_aux: `[heads]` logits of attention sinks, which take weight and give nothing (GPT-OSS).

    Returns:
        `[1, T, heads, value_size]`, as transformers' attention interface wants it.

    Raises:
        ValueError: the row's bounds are missing, or the model asks for something that is not computed here.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed_sdpa needs cu_seq_lens_q and max_length_q: the row's sequences")
    if attention_mask is not None:
        raise ValueError("packed_sdpa builds no mask, and cannot follow one that the model has made itself")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    # A sequence's own width decides whether its window matters, not its longest neighbour: see `_row_layout`.
    window = sliding_window or None
    if not causal and ((window or max_length_q) < max_length_q or softcap is not None or s_aux is not None):
        raise ValueError(
            "packed_sdpa computes sliding windows, soft caps and attention sinks only for causal attention; "
            "choose another `attention`"
        )
    wanted = _Attention(scaling, dropout if module.training else 0.0, causal, window, softcap, s_aux)
    if _has_varlen_kernel(query, value, wanted):
        return _varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, wanted), None
    starts = tuple(cu_seq_lens_q.tolist())
    if not causal and query.device.type == "cpu" and query.shape[1] == key.shape[1]:
        lengths = [end - start for start, end in pairwise(starts)]
        return _plain_attention(query, key, value, lengths, scaling, wanted.dropout), None
    layout = _row_layout(starts, query.device)
    heads = [each[0].transpose(0, 1) for each in (query, key, value)]
    attended = torch.cat([_padded_attention(heads, group, wanted) for group in layout.groups])
    return attended.index_select(0, layout.places)[None], None


@dataclass(frozen=True)
class _Attention:
    """What a layer asks for; see `packed_sdpa`."""

    scaling: float | None
    dropout: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor, wanted: _Attention) -> bool:
    """Whether torch's variable-length kernel computes this."""
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[-1] == size
        and size % 8 == 0
        and size <= 256
        and not wanted.dropout
        and wanted.softcap is None
        and wanted.sinks is None
    )


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, wanted: _Attention
) -> torch.Tensor:
    """`[1, T, heads, head_size]`."""
    window = (-1, -1) if not wanted.causal else (-1, 0) if wanted.window is None else (wanted.window - 1, 0)
    heads = [each[0].transpose(0, 1) for each in (query, key, value)]
    attended = varlen_attn(
        *heads,
        starts,
        starts,
        longest,
        longest,
        scale=wanted.scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None]


@dataclass(frozen=True)
class _WidthGroup:
    """Sequences of a packed row that are padded to the same width.

    Attributes:
        lengths: `[S]` of the sequences.
        width: they are padded to.
        tokens: `[N]` where their tokens are in the row.
        slots: `[N]` where those are in the flattened `[S, width]`.
    """

    lengths: torch.Tensor
    width: int
    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class _RowLayout:
    """How a packed row becomes padded batches, and back.

    Attributes:
        places: `[T]` where each token of the row is among the tokens of all groups.
    """

    groups: tuple[_WidthGroup, ...]
    places: torch.Tensor


@lru_cache(maxsize=2)
def _row_layout(starts: tuple[int, ...], device: torch.device) -> _RowLayout:
    """Group sequences by the width that they are padded to; computed once per row, not once per layer.

    The kernel of attention sums in an order that depends on the padded width. The width is therefore one of the
    sequence itself, not of its longest neighbour: what else is in the row then changes nothing, bit-for-bit.
    """
    # Kept tensors must also serve a later training pass, which refuses those made in inference mode.
    with torch.inference_mode(False):
        bounds = torch.tensor(starts, device=device)
        lengths = bounds.diff()
        widths = -(-lengths // _WIDTH_STEP) * _WIDTH_STEP
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        offset = torch.arange(len(sequence), device=device) - bounds[sequence]
        groups: list[_WidthGroup] = []
        for width in widths.unique().tolist():
            chosen = widths == width
            tokens = chosen[sequence].nonzero()[:, 0]
            slots = (chosen.cumsum(0) - 1)[sequence[tokens]] * width + offset[tokens]
            groups.append(_WidthGroup(lengths[chosen], width, tokens, slots))
        return _RowLayout(tuple(groups), torch.cat([group.tokens for group in groups]).argsort())


def _padded_attention(heads: Sequence[torch.Tensor], group: _WidthGroup, wanted: _Attention) -> torch.Tensor:
    """`[N, heads, value_size]` of a group's tokens, from query, key and value as `[T, heads, size]`."""
    num_sequences, width = len(group.lengths), group.width
    short = wanted.causal and width <= SHORT_WIDTH and heads[0].device.type == "cpu"
    if short:
        # Few different shapes, as in `PackedBatch.filling`.
        num_sequences = 1 << (num_sequences - 1).bit_length()

    def spread(packed: torch.Tensor) -> torch.Tensor:
        padded = packed.new_zeros(num_sequences * width, *packed.shape[1:])
        padded = padded.index_copy(0, group.slots, packed.index_select(0, group.tokens))
        return padded.unflatten(0, (num_sequences, width)).transpose(1, 2)

    query, key, value = (spread(each) for each in heads)
    if short or wanted.softcap is not None or wanted.sinks is not None:
        attended = _written_out_attention(query, key, value, wanted)
    else:
        mask = None
        if not wanted.causal:
            mask = (torch.arange(width, device=query.device) < group.lengths[:, None])[:, None, None, :]
        elif wanted.window is not None and wanted.window < width:
            mask = ~_causal_hidden(width, wanted.window, query.device)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=wanted.dropout,
            is_causal=mask is None,
            scale=wanted.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, group.slots)


def _causal_hidden(width: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[width, width]`, true where a query (row) does not see a key (column)."""
    seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return ~(seen if window is None else seen.triu(1 - window))


def _written_out_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, wanted: _Attention
) -> torch.Tensor:
    """Causal attention as `[S, heads, width, value_size]`, scores and weights in float32: with what the fused kernel
    has no argument for, and where its backward pass is slow.

    All queries that share a key are rows of one matrix product, so keys and values are not repeated.
    """
    num_sequences, num_heads, width, size = query.shape
    groups = num_sequences * key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys, values = (each.to(dtype).reshape(groups, -1, each.shape[-1]) for each in (query, key, value))
    scale = size**-0.5 if wanted.scaling is None else wanted.scaling
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(num_sequences, num_heads, width, width) * scale
    if wanted.softcap is not None:
        scores = (scores / wanted.softcap).tanh() * wanted.softcap
    hidden = torch.zeros(width, width, dtype=dtype, device=query.device)
    scores = scores + hidden.masked_fill_(_causal_hidden(width, wanted.window, query.device), -torch.inf)
    if wanted.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = wanted.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    attended = torch.bmm(F.dropout(weights, wanted.dropout).reshape(groups, -1, width), values)
    return attended.view(num_sequences, num_heads, width, -1).to(query.dtype)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """`[1, T, heads, head_size]`, one sequence after another: for the short texts that encoders are given on a CPU,
    matrix products without padding and mask are several times faster in the backward pass than the fused kernel."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # `split` gathers the gradients once; slices would each add to the whole. In float32, because bfloat16 products
    # are compiled for every shape, and every length is one.
    parts = zip(*(each[0].float().split(lengths, dim=1) for each in (query, key, value)), strict=True)
    attended = []
    for q, k, v in parts:
        weights = (product_of_rare_shape(q, k.transpose(-1, -2)) * scale).softmax(-1)
        attended.append(product_of_rare_shape(F.dropout(weights, dropout), v))
    return torch.cat(attended, dim=1).transpose(0, 1)[None].to(query.dtype)


def register_packed_sdpa() -> None:
    """Make `attn_implementation="packed_sdpa"` known to transformers (no mask is built for it)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("packed_sdpa", packed_sdpa)
    AttentionMaskInterface.register("packed_sdpa", _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The sequences' bounds travel as `cu_seq_lens_*`; there is no mask to build."""
