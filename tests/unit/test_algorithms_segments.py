"""Sums over flat samples, and moments that add up over ranks."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.segments import Moments, last_index, segment_ids, segment_sum

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
FLOATS = st.lists(st.floats(-100, 100), max_size=20)


@settings(deadline=None, derandomize=True)
@given(LENGTHS)
def test_segments_are_the_consecutive_slices(sizes: list[int]) -> None:
    lengths = torch.tensor(sizes)
    values = torch.arange(sum(sizes), dtype=torch.float64) ** 2
    slices = values.split(sizes)
    assert segment_ids(lengths).tolist() == [index for index, size in enumerate(sizes) for _ in range(size)]
    torch.testing.assert_close(segment_sum(values, lengths), torch.stack([each.sum() for each in slices]))
    assert torch.equal(values[last_index(lengths)], torch.stack([each[-1] for each in slices]))


def test_segment_sum_passes_gradients_to_its_own_tokens() -> None:
    values = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (segment_sum(values, torch.tensor([2, 3])) * torch.tensor([10.0, 20.0])).sum().backward()
    assert values.grad.tolist() == [10, 10, 20, 20, 20]


@settings(deadline=None, derandomize=True)
@given(FLOATS, FLOATS)
def test_moments_of_parts_add_up_to_those_of_the_whole(left: list[float], right: list[float]) -> None:
    whole = torch.tensor(left + right, dtype=torch.float64)
    parts = [torch.tensor(each, dtype=torch.float64) for each in (left, right)]
    added = Moments.of(parts[0]) + Moments.of(parts[1])
    reduced = Moments.of(parts[0]).reduced(lambda sums: sums + torch.tensor(Moments.of(parts[1]).vector()).double())
    if not len(whole):
        assert math.isnan(added.mean)
        assert math.isnan(added.std)
        return
    for moments in (added, reduced):
        assert moments.count == len(whole)
        assert math.isclose(moments.mean, float(whole.mean()), rel_tol=1e-5, abs_tol=1e-5)
    assert math.isclose(added.std, float(whole.std(correction=0)), rel_tol=1e-6, abs_tol=1e-5)


def test_moments_ignore_whatever_is_masked() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.inf])
    moments = Moments.of(values, torch.tensor([True, False, True, False]))
    assert moments == Moments(2.0, 4.0, 10.0)
    assert (moments.mean, moments.std) == (2.0, 1.0)
