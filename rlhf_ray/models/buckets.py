"""Weights on their way from a learner to an engine: a few large flat objects in place of many small ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors of a model as one flat array, which Ray hands out without copying.

    Attributes:
        data: `[bytes]` uint8, the tensors one after another.
        names, dtypes, shapes: of each tensor, in that order; dtypes by torch's name.
    """

    data: NDArray[np.uint8]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, as views of `data` (read-only memory: copy before writing)."""
        start = 0
        for name, dtype_name, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            count = int(np.prod(shape, dtype=np.int64))
            yield name, torch.frombuffer(self.data, dtype=dtype, count=count, offset=start).view(shape)
            start += _aligned(count * dtype.itemsize)


def fill_buckets(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[WeightBucket]:
    """Group tensors, in their order, into buckets of at most `max_bytes` (a larger tensor has its own)."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous()
        tensor_bytes = _aligned(tensor.numel() * tensor.element_size())
        if held and size + tensor_bytes > max_bytes:
            yield _bucket(held, size)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor_bytes
    if held:
        yield _bucket(held, size)


def _bucket(held: list[tuple[str, torch.Tensor]], size: int) -> WeightBucket:
    data = np.zeros(size, dtype=np.uint8)
    start = 0
    for _, tensor in held:
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        data[start : start + len(flat)] = flat
        start += _aligned(len(flat))
    return WeightBucket(
        data=data,
        names=tuple(name for name, _ in held),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in held),
        shapes=tuple(tuple(tensor.shape) for _, tensor in held),
    )


def _aligned(num_bytes: int) -> int:
    """Every tensor starts on 8 bytes, so any type can be read in place."""
    return (num_bytes + 7) // 8 * 8
