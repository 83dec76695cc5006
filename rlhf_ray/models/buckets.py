"""Weights on their way from a learner to an engine: a few large objects in place of many small ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from rlhf_ray.rollout import ProbeColumn


class WeightsDamaged(RuntimeError):
    """A tensor that arrived is not the one that was sent."""


@dataclass(frozen=True)
class WeightBucket:
    """Some tensors of a model. Ray copies each once into the object store, and hands it out from there uncopied.

    Attributes:
        names: Hugging Face names of the tensors.
        dtypes: by torch's name.
        shapes: of the tensors.
        data: each tensor's bytes, `[numel * itemsize]` uint8.
        digests: XXH3 of each tensor's bytes where they were sent.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    data: tuple[NDArray[np.uint8], ...]
    digests: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightBucket:
        """A bucket of named tensors; it shares the memory of those that are contiguous on a CPU."""
        held = [(name, tensor.detach().cpu().contiguous()) for name, tensor in tensors]
        data = tuple(tensor.reshape(-1).view(torch.uint8).numpy() for _, tensor in held)
        return cls(
            names=tuple(name for name, _ in held),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in held),
            shapes=tuple(tuple(tensor.shape) for _, tensor in held),
            data=data,
            digests=tuple(map(_digest, data)),
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, as views of `data` (read-only memory: copy before writing).

        Raises:
            WeightsDamaged: a tensor's bytes are not those that were sent.
        """
        for name, dtype, shape, data, digest in zip(
            self.names, self.dtypes, self.shapes, self.data, self.digests, strict=True
        ):
            if _digest(data) != digest:
                raise WeightsDamaged(f"the weights of '{name}' changed on their way to the engine")
            yield name, torch.frombuffer(data, dtype=getattr(torch, dtype)).view(shape)


@dataclass(frozen=True)
class Proof:
    """What an engine that computes with some weights must come to.

    Attributes:
        tokens: rows of token ids, the same at every version.
        learner: the learner's log-probs of these tokens under the weights.
    """

    tokens: tuple[NDArray[np.int32], ...]
    learner: ProbeColumn


@dataclass(frozen=True)
class Snapshot:
    """The trained weights of one version of the policy. Weights that are never trained are in the model's directory.

    Attributes:
        version: how many steps the policy has been trained for.
        names: of all tensors, over all buckets; none where the weights come another way (NCCL).
        buckets: fetched one after another, and only when they are read, each time anew.
        proof: None: nothing is known of them.
    """

    version: int
    names: frozenset[str]
    buckets: Iterable[WeightBucket]
    proof: Proof | None = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors.

        Raises:
            WeightsDamaged: a tensor is damaged, missing, or there twice.
        """
        missing = set(self.names)
        for bucket in self.buckets:
            for name, tensor in bucket.tensors():
                if name not in missing:
                    raise WeightsDamaged(f"version {self.version} has the weights of '{name}' twice, or should not")
                missing.discard(name)
                yield name, tensor
        if missing:
            raise WeightsDamaged(f"version {self.version} lacks the weights of {', '.join(sorted(missing)[:3])}")


UNTRAINED = Snapshot(version=0, names=frozenset(), buckets=())
"""The weights in the model's directory."""


def bucket_names(sizes: Sequence[tuple[str, int]], max_bytes: int) -> list[tuple[str, ...]]:
    """Group named tensors, in their order, into buckets of at most `max_bytes`; a larger tensor is alone.

    Args:
        sizes: name and bytes of each.
    """
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not buckets or size > room:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(name)
        room -= size
    return [tuple(bucket) for bucket in buckets]


def _digest(data: NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(data.data)
