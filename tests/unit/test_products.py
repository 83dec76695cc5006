"""Which library multiplies float32 matrices on a CPU, and that none of their digits are lost by it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlhf_ray.models import products
from tests.making import rounding

TERMS = 192


@pytest.fixture
def switch() -> Iterator[Any]:
    """torch's switch, as it is before a role sets it."""
    switch = torch.backends.mkldnn.matmul
    usual, switch.fp32_precision = switch.fp32_precision, "none"
    yield switch
    switch.fp32_precision = usual


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
def test_products_are_those_of_float32(monkeypatch: pytest.MonkeyPatch, switch: Any, vendor: str):
    monkeypatch.setattr(products, "cpu_entry", {"vendor_id": vendor}.get)
    chosen = products.prefer_onednn()
    assert switch.fp32_precision == ("bf16" if chosen else "none")
    assert not chosen or vendor == "AuthenticAMD"
    random = torch.Generator().manual_seed(0)
    left, right, bias = (torch.rand(shape, generator=random) for shape in ((257, TERMS), (TERMS, 80), (80,)))
    exact = left.double() @ right.double()
    bound = rounding(TERMS, float(exact.max()))
    torch.testing.assert_close((left @ right).double(), exact, rtol=0, atol=bound)
    torch.testing.assert_close(torch.addmm(bias, left, right).double(), exact + bias, rtol=0, atol=bound)
    batched = torch.bmm(left[None], right[None])[0]
    torch.testing.assert_close(batched.double(), exact, rtol=0, atol=bound)


def test_where_digits_would_be_lost_nothing_changes(monkeypatch: pytest.MonkeyPatch, switch: Any):
    monkeypatch.setattr(products, "cpu_entry", {"vendor_id": "AuthenticAMD"}.get)
    monkeypatch.setattr(products, "_keeps_digits", lambda: False)
    assert not products.prefer_onednn()
    assert switch.fp32_precision == "none"


def test_lost_digits_are_noticed(monkeypatch: pytest.MonkeyPatch):
    assert products._keeps_digits()
    full = torch.Tensor.__matmul__
    rounded = lambda left, right: full(left.bfloat16(), right.bfloat16()).float()  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products._keeps_digits()


def test_products_of_rare_shapes_are_left_to_mkl_in_both_directions(monkeypatch: pytest.MonkeyPatch, switch: Any):
    switch.fp32_precision = "bf16"
    seen: list[str] = []
    full = torch.Tensor.__matmul__

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(switch.fp32_precision)
        return full(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.rand(shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5, 4))
    )
    assert torch.autograd.gradcheck(products.product_of_rare_shape, (left, right))
    assert len(seen) > 2
    assert set(seen) == {"none"}
    assert switch.fp32_precision == "bf16"
