"""Sequences of different lengths in one row, without padding and without seeing each other.

`flash_attention_2` on a GPU and `packed_sdpa` (ours, for CPUs) take such rows with the same arguments
(`cu_seq_lens_*`, as transformers names them). A block-diagonal mask over the whole row would cost the square
of the row's length; `packed_sdpa` pays only for each sequence by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from rlhf_ray.rollout import Rollout, offsets

_WIDTH_STEP = 16
"""Sequences are padded to multiples of so many tokens."""


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
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    predict_at: torch.Tensor
    targets: torch.Tensor
    columns: torch.Tensor

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model."""
        bounds = RowBounds(self.lengths).model_inputs(self.input_ids.device)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, **bounds, "use_cache": False}

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.lengths,
            self.predict_at.to(device),
            self.targets.to(device),
            self.columns.to(device),
        )


def pack(
    sequences: Sequence[NDArray[np.int32]], learn_from: Sequence[int], column_starts: Sequence[int] | None = None
) -> PackedBatch:
    """Put sequences one after another.

    Args:
        sequences: token ids, each at least 2 long.
        learn_from: for each, the first index that is predicted (at least 1).
        column_starts: for each, where its predicted tokens start in the caller's columns; one after another if empty.
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
    return PackedBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=RowBounds(lengths).position_ids(),
        lengths=tuple(lengths),
        predict_at=torch.from_numpy(predict_at),
        targets=torch.from_numpy(tokens[predict_at + 1]),
        columns=torch.from_numpy(columns),
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
    points into.
    """

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
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

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def num_columns(self) -> int:
        """`R`, response tokens in all."""
        return int(self.column_starts[-1])

    def samples_of(self, rollout: int) -> range:
        """Numbers of the samples of one rollout."""
        return range(self._first_sample[rollout], self._first_sample[rollout + 1])

    def columns_of(self, rollout: int) -> slice:
        """Where the token columns of one rollout stand."""
        samples = self.samples_of(rollout)
        return slice(int(self.column_starts[samples.start]), int(self.column_starts[samples.stop]))

    def count_packs(self, samples: Sequence[int], max_tokens: int) -> int:
        """How many packs the chosen samples need."""
        return len(micro_batches([len(self._sequences[sample]) for sample in samples], max_tokens))

    def pack(self, samples: Sequence[int], max_tokens: int, at_least: int = 1) -> list[PackedBatch]:
        """Packs of the chosen samples, cut as by `micro_batches`; every response token is predicted."""
        groups = micro_batches([len(self._sequences[sample]) for sample in samples], max_tokens, at_least)
        return [
            pack(
                [self._sequences[samples[i]] for i in group],
                [self._prompt_lengths[samples[i]] for i in group],
                [int(self.column_starts[samples[i]]) for i in group],
            )
            for group in groups
        ]


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed row, each sequence by itself: the row is laid out as a padded batch only here.

    Args:
        query: `[1, heads, T, head_size]`; key and value the same with their own number of heads.
        cu_seq_lens_q: `[S + 1]` starts of the sequences, with the total at the end.

    Returns:
        `[1, T, heads, head_size]`, as transformers' attention interface wants it.

    Raises:
        ValueError: the row's bounds are missing, or the model asks for something that is not computed here.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed_sdpa needs cu_seq_lens_q and max_length_q: the row's sequences")
    _refuse_other_attention(max_length_q, **kwargs)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    rate = dropout if module.training else 0.0
    starts = cu_seq_lens_q.to(torch.int64)
    if not causal and query.device.type == "cpu" and query.shape[1] == key.shape[1]:
        return _plain_attention(query, key, value, starts.diff().tolist(), scaling, rate), None
    groups = list(_groups_of_like_width(starts))
    heads = [each[0].transpose(0, 1) for each in (query, key, value)]
    attended = torch.cat([_padded_attention(heads, group, scaling, rate, causal) for group in groups])
    places = torch.cat([group.tokens for group in groups]).argsort()
    return attended.index_select(0, places)[None], None


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


def _groups_of_like_width(starts: torch.Tensor) -> Iterator[_WidthGroup]:
    """The kernel of attention sums in an order that depends on the padded width. The width is therefore one of the
    sequence itself, not of its longest neighbour: then what else is in the row changes no bit."""
    lengths = starts.diff()
    widths = -(-lengths // _WIDTH_STEP) * _WIDTH_STEP
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
    offset = torch.arange(len(sequence), device=starts.device) - starts[sequence]
    for width in widths.unique().tolist():
        chosen = widths == width
        tokens = chosen[sequence].nonzero()[:, 0]
        slots = (chosen.cumsum(0) - 1)[sequence[tokens]] * width + offset[tokens]
        yield _WidthGroup(lengths[chosen], width, tokens, slots)


def _padded_attention(
    heads: Sequence[torch.Tensor], group: _WidthGroup, scaling: float | None, dropout: float, causal: bool
) -> torch.Tensor:
    """`[N, heads, head_size]` of a group's tokens, from query, key and value as `[T, heads, head_size]`."""
    num_sequences, width = len(group.lengths), group.width

    def spread(packed: torch.Tensor) -> torch.Tensor:
        padded = packed.new_zeros(num_sequences * width, *packed.shape[1:])
        padded = padded.index_copy(0, group.slots, packed.index_select(0, group.tokens))
        return padded.unflatten(0, (num_sequences, width)).transpose(1, 2)

    query, key, value = (spread(each) for each in heads)
    mask = None
    if not causal:
        mask = (torch.arange(width, device=query.device) < group.lengths[:, None])[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, group.slots)


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
    attended = [F.dropout((q @ k.transpose(-1, -2) * scale).softmax(-1), dropout) @ v for q, k, v in parts]
    return torch.cat(attended, dim=1).transpose(0, 1)[None].to(query.dtype)


def _refuse_other_attention(
    longest: int, sliding_window: int | None = None, softcap: float | None = None, s_aux: Any = None, **kwargs: Any
) -> None:
    """What an architecture adds to attention comes as keyword arguments; left out, results are wrong in silence."""
    unknown = {
        f"sliding_window {sliding_window} below the longest sequence, {longest}": sliding_window is not None
        and 0 < sliding_window < longest,
        f"softcap {softcap}": softcap is not None,
        "attention sinks (s_aux)": s_aux is not None,
    }
    found = [name for name, asked in unknown.items() if asked]
    if found:
        raise ValueError(f"packed_sdpa does not compute {', '.join(found)}; choose another `attention`")


def register_packed_sdpa() -> None:
    """Make `attn_implementation="packed_sdpa"` known to transformers (no mask is built for it)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("packed_sdpa", packed_sdpa)
    AttentionMaskInterface.register("packed_sdpa", _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The sequences' bounds travel as `cu_seq_lens_*`; there is no mask to build."""
