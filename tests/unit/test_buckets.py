"""Weights come out of their buckets as they went in."""

import pytest
import torch

from rlhf_ray.models.buckets import fill_buckets

TENSORS = {
    "matrix": torch.randn(7, 5),
    "odd": torch.randn(3).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "turned": torch.randn(4, 6).T,
    "half": torch.randn(1, 3, 5, dtype=torch.float16),
    "counts": torch.tensor([1, -2, 3], dtype=torch.int64),
    "last": torch.randn(9, 9),
}


@pytest.mark.parametrize("max_bytes", [1, 64, 200, 1 << 20])
def test_round_trip(max_bytes: int):
    buckets = list(fill_buckets(TENSORS.items(), max_bytes))
    found = [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket.tensors()]
    assert [name for name, _ in found] == list(TENSORS)
    for name, tensor in found:
        assert tensor.dtype == TENSORS[name].dtype
        assert tensor.shape == TENSORS[name].shape
        assert torch.equal(tensor, TENSORS[name])
    assert all(len(bucket.data) <= max_bytes or len(bucket.names) == 1 for bucket in buckets)
    if max_bytes == 1:
        assert len(buckets) == len(TENSORS)


def test_every_tensor_starts_on_eight_bytes():
    [bucket] = fill_buckets(TENSORS.items(), 1 << 20)
    base = bucket.data.ctypes.data
    assert all((tensor.data_ptr() - base) % 8 == 0 for _, tensor in bucket.tensors())


def test_views_of_read_only_memory():
    """Ray's arrays are read-only: reading must neither copy nor fail."""
    [bucket] = fill_buckets(TENSORS.items(), 1 << 20)
    bucket.data.flags.writeable = False
    for name, tensor in bucket.tensors():
        assert torch.equal(tensor, TENSORS[name])
        offset = tensor.data_ptr() - bucket.data.ctypes.data
        assert 0 <= offset < bucket.data.nbytes


def test_a_bucket_is_a_copy():
    weight = torch.nn.Parameter(torch.ones(4))
    [bucket] = fill_buckets([("weight", weight)], 1 << 20)
    weight.data.fill_(7)
    assert dict(bucket.tensors())["weight"].tolist() == [1, 1, 1, 1]


def test_no_tensors_no_buckets():
    assert list(fill_buckets([], 8)) == []
