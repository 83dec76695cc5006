"""Which library multiplies float32 matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_ray.models.loading import cpu_entry


def prefer_onednn() -> bool:
    """On AMD's CPUs with AVX-512, have oneDNN multiply float32 matrices in this process; tells whether it does.

    torch leaves them to MKL, which reaches half of oneDNN's speed there (Zen 5, two cores: 205 and 420 GFLOP/s). The
    only switch that torch has for it also allows bfloat16 inside the products. oneDNN takes that up on CPUs with AMX,
    and AMD makes none; should it lose digits all the same, the switch goes back. CPUs without AVX-512 stay with MKL
    whatever the switch says.
    """
    if cpu_entry("vendor_id") != "AuthenticAMD":
        return False
    products = torch.backends.mkldnn.matmul
    usual, products.fp32_precision = products.fp32_precision, "bf16"
    if not _keeps_digits():
        products.fp32_precision = usual
        return False
    return True


def _keeps_digits() -> bool:
    """Whether a product has the digits of float32 that neither bfloat16 nor TF32 has."""
    values = 1 + torch.arange(64.0).repeat(64, 1) / 2**14
    return torch.equal(values @ torch.eye(64), values)


def product_of_rare_shape(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right`, for float32 matrices whose shape seldom comes again, such as those of one text's attention.

    oneDNN would compile each of them and its gradients, and keep them: for matrices as small as these that takes longer
    than MKL takes to multiply them, and a process that reads texts of all lengths would grow by hundreds of megabytes.
    """
    product: torch.Tensor = _RareProduct.apply(left, right)
    return product


class _RareProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        with _left_to_mkl():
            return left @ right

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = ctx.saved_tensors
        with _left_to_mkl():
            return gradient @ right.transpose(-1, -2), left.transpose(-1, -2) @ gradient


@contextmanager
def _left_to_mkl() -> Iterator[None]:
    products = torch.backends.mkldnn.matmul
    usual, products.fp32_precision = products.fp32_precision, "none"
    try:
        yield
    finally:
        products.fp32_precision = usual
