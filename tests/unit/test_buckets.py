"""Weights come out of their buckets as they went in, and whatever happens to them on the way is noticed."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.models.buckets import Snapshot, WeightBucket, WeightsDamaged, bucket_names

TENSORS = {
    "matrix": torch.randn(7, 5),
    "odd": torch.randn(3).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "transposed": torch.randn(4, 6).T,
    "half": torch.randn(1, 3, 5, dtype=torch.float16),
    "counts": torch.tensor([1, -2, 3], dtype=torch.int64),
    "last": torch.randn(9, 9),
}


def test_round_trip_through_read_only_memory():
    """Ray's arrays are read-only: reading must neither copy nor fail."""
    bucket = WeightBucket.of(TENSORS.items())
    for data in bucket.data:
        data.flags.writeable = False
    found = list(bucket.tensors())
    assert [name for name, _ in found] == list(TENSORS)
    for (name, tensor), data in zip(found, bucket.data, strict=True):
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.data_ptr() == data.ctypes.data


def test_tensors_in_memory_are_not_copied():
    weight = torch.nn.Parameter(torch.ones(4))
    bucket = WeightBucket.of([("weight", weight)])
    assert bucket.data[0].ctypes.data == weight.data_ptr()


@pytest.mark.parametrize("max_bytes", [1, 64, 200, 1 << 20])
def test_buckets_hold_what_fits(max_bytes: int):
    sizes = [(name, tensor.nbytes) for name, tensor in TENSORS.items()]
    buckets = bucket_names(sizes, max_bytes)
    assert [name for bucket in buckets for name in bucket] == list(TENSORS)
    for bucket in buckets:
        assert sum(TENSORS[name].nbytes for name in bucket) <= max_bytes or len(bucket) == 1
    if max_bytes == 1:
        assert len(buckets) == len(TENSORS)


def test_no_tensors_no_buckets():
    assert bucket_names([], 8) == []


def snapshot(buckets: Iterator[WeightBucket] | list[WeightBucket]) -> Snapshot:
    return Snapshot(version=3, names=frozenset({"a", "b"}), buckets=buckets)


def test_a_snapshot_gives_every_tensor_once_and_reads_buckets_as_it_goes():
    opened = []

    def buckets() -> Iterator[WeightBucket]:
        for name in ("a", "b"):
            opened.append(name)
            yield WeightBucket.of([(name, torch.ones(2))])

    tensors = snapshot(buckets()).tensors()
    assert (next(tensors)[0], opened) == ("a", ["a"])
    assert ([name for name, _ in tensors], opened) == (["b"], ["a", "b"])


def test_what_is_lost_damaged_or_foreign_is_named():
    a, b, c = (WeightBucket.of([(name, torch.randn(300))]) for name in "abc")
    with pytest.raises(WeightsDamaged, match="version 3 lacks the weights of b"):
        list(snapshot([a]).tensors())
    for wrong in ([a, b, b], [a, b, c]):
        with pytest.raises(WeightsDamaged, match="twice, or should not"):
            list(snapshot(wrong).tensors())
    for damaged in (np.zeros_like(b.data[0]), np.roll(b.data[0], 4)):
        with pytest.raises(WeightsDamaged, match="weights of 'b' changed on their way"):
            list(snapshot([a, replace(b, data=(damaged,))]).tensors())
