"""RMSNorm and LayerNorm of rows, or of the sum of two tensors, in one pass over memory.

Law, for a row s = x, or s = round(x + residual), of N elements, with everything in fp32:

    m = 0                              RMSNorm;    sum_n s[n] / N       LayerNorm (CENTER)
    v = sum_n (s[n] - m)² / N
    y = round((s - m) / sqrt(v + eps) * (shift + weight) + bias)

and where FORM asks for it, before rounding, z -> P(z) / Q(z) with one row of coefficients, or one
per group of adjacent elements, as in `group_rational`: FORM 0 "abs_terms", 1 "abs_coefficients",
2 "abs_sum". A program holds BLOCK_M whole rows in registers, so each is read once; the squares of
LayerNorm are those of the centred values, so that nothing cancels. No atomics: repeatable bit by
bit. This file needs only torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.rational_parts import FORMS, rational, rational_constants

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    numerator_ptr,
    denominator_ptr,
    y_ptr,
    sum_ptr,
    rows,
    eps,
    shift,
    SIZE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CENTER: tl.constexpr,
    FORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (ceil(rows / BLOCK_M),). x, residual, y, sum contiguous [rows,N]; weight, bias [N].

    FORM -1: no rational function; else numerator [G, M + 1] and denominator [G, N], WIDTH elements
    of a row for each of their rows, 0 where they have one for all.

    Bytes per row of N elements of b: N b read (twice that with a residual), the same written.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = column < SIZE
    live = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    s = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        total = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=live)
        s = total.to(tl.float32)
    if CENTER:
        mean = tl.sum(s, 1) / SIZE
        s = tl.where(inside[None, :], s - mean[:, None], 0.0)
    scale = tl.math.rsqrt(tl.sum(s * s, 1) / SIZE + eps)
    y = s * scale[:, None]
    if WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y *= (weight + shift)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if FORM >= 0:
        y = rational(
            y, numerator_ptr, denominator_ptr, 0, column, inside,
            FORM, M, N, WIDTH_A, WIDTH_B, BLOCK_N,
        )  # fmt: skip
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


def _shape(coefficients: Tensor | None) -> tuple[int, int] | None:
    return None if coefficients is None else tuple(coefficients.shape)  # pyright: ignore


def norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    numerator: Tensor | None = None,
    denominator: Tensor | None = None,
    *,
    eps: float,
    shift: float = 0.0,
    center: bool = False,
    form: str = FORMS[0],
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int = 1,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. x, residual [..., N] of one dtype and any strides; weight, bias [N];
    numerator [1 or G, m+1] and denominator [1 or G, n >= 1] of the rational function, if any.

    Returns (y, s), both [..., N] contiguous in x's dtype; without a residual s is x.
    """
    size = x.shape[-1]
    if size > block_n:
        raise ValueError(f"expected at most block_n = {block_n} elements per row, found {size}")
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    rows = x.numel() // size if size else 0
    if not rows:
        return y, total
    norm_forward[(triton.cdiv(rows, block_m),)](
        x,
        x if residual is None else residual,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x if numerator is None else numerator.contiguous(),
        x if denominator is None else denominator.contiguous(),
        y,
        total,
        rows,
        eps,
        shift,
        SIZE=size,
        RESIDUAL=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        CENTER=center,
        **rational_constants(size, _shape(numerator), _shape(denominator), form),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y, total


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: LayerNorm of the sum of two tensors, fp16."""
    generator = torch.Generator().manual_seed(0)
    size = config["block_n"] - 3
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator).to(device, torch.float16)
        for shape in ((5, size), (5, size), (size,), (size,))
    )
    y, total = norm(x, residual, weight, bias, eps=1e-5, center=True, **config)
    wide = total.double()
    expected = torch.nn.functional.layer_norm(wide, (size,), weight.double(), bias.double(), 1e-5)
    return float((y.double() - expected).norm() / expected.norm())
