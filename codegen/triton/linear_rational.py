"""A linear layer with a rational function of its results, or of its input, in Triton.

Law, P/Q with one row of coefficients, or one per group of adjacent channels (`group_rational`):

    y[m,n] = round(P(t) / Q(t)),                t = sum_k x[m,k] w[n,k] + b[n]        OUTPUT
    y[m,n] = round(sum_k z[m,k] w[n,k] + b[n]), z = round(P(x[m,k]) / Q(x[m,k]))      otherwise

Products of x's dtype are summed in fp32, and the rational function is taken in fp32: of a tile of
sums in registers, once per element, or of each tile of x as it is loaded, once per column of tiles.
No split of K and no atomics: results repeat bit by bit. The order of programs is that of Triton's
matrix multiplication tutorial. This file needs only torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.rational_parts import FORMS, rational, rational_constants

# The interpreter reads bf16 operands of `tl.dot` as integers; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def linear_rational_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    numerator_ptr,
    denominator_ptr,
    y_ptr,
    tokens,
    out_features,
    in_features,
    stride_x,
    stride_w,
    OUTPUT: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED_K: tl.constexpr,
    FORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y [tokens,N] contiguous; x and weight have a contiguous last dimension.

    Grid: (ceil(tokens / BLOCK_M) * ceil(N / BLOCK_N),), GROUP rows of tiles at a time, which share
    columns of the weight in L2.
    """
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    of_group = GROUP * column_tiles
    first_row = tl.program_id(0) // of_group * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = tl.program_id(0) % of_group
    first = within // height * BLOCK_N
    m = (first_row + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < tokens, n < out_features
    x_tile = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = weight_ptr + n.to(tl.int64)[None, :] * stride_w + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        in_k = start + k < in_features
        live_x, live_w = in_m[:, None], in_n[None, :]
        if RAGGED_K:
            live_x, live_w = live_x & in_k[None, :], live_w & in_k[:, None]
        x = tl.load(x_tile, mask=live_x, other=0.0)
        w = tl.load(w_tile, mask=live_w, other=0.0)
        if not OUTPUT:  # beyond K the weight is 0, and P/Q of 0 is finite
            z = rational(
                x.to(tl.float32), numerator_ptr, denominator_ptr, start, start + k, in_k,
                FORM, M, N, WIDTH_A, WIDTH_B, BLOCK_K,
            )  # fmt: skip
            x = z.to(x_ptr.dtype.element_ty)
        if UPCAST:
            sums = tl.dot(x.to(tl.float32), w.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(x, w, sums, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if OUTPUT:
        sums = rational(
            sums, numerator_ptr, denominator_ptr, first, n, in_n,
            FORM, M, N, WIDTH_A, WIDTH_B, BLOCK_N,
        )  # fmt: skip
    at = m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def _rows(x: Tensor) -> Tensor:
    """x as [rows, K], last dimension contiguous; copied only where no view has that shape."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear_rational(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = FORMS[0],
    side: str = "output",
    block_m: int,
    block_n: int,
    block_k: int,
    group: int = 8,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """Launches the kernel: x [..., K], weight [N,K] of one dtype and any strides, bias [N];
    numerator [1 or G, m+1] and denominator [1 or G, n >= 1] of N or K channels, contiguous.
    Returns [..., N], x.dtype."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if not y.numel():
        return y
    rows, weight = _rows(x), _rows(weight)
    channels = weight.shape[0] if side == "output" else weight.shape[1]
    shapes = (tuple(numerator.shape), tuple(denominator.shape))
    programs = triton.cdiv(rows.shape[0], block_m) * triton.cdiv(weight.shape[0], block_n)
    linear_rational_forward[(programs,)](
        rows, weight, weight if bias is None else bias.contiguous(), numerator, denominator, y,
        rows.shape[0], weight.shape[0], weight.shape[1], rows.stride(0), weight.stride(0),
        OUTPUT=side == "output", BIAS=bias is not None, RAGGED_K=weight.shape[1] % block_k != 0,
        **rational_constants(channels, *shapes, form),  # pyright: ignore[reportArgumentType]
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=group, UPCAST=INTERPRETED,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y


def self_check(device: str, **config: int) -> float:
    """Largest relative Frobenius error of both sides against float64: 70 x 48 by 72 x 48, fp16."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, 48, generator=generator).half().to(device) for s in (70, 72))
    bias, a = (torch.randn(s, generator=generator).to(device) for s in ((72,), (3, 4)))
    b = torch.rand(3, 2, generator=generator).to(device) + 0.1

    def law(t: Tensor) -> Tensor:
        width = t.shape[-1] // 3
        top = sum(c.repeat_interleave(width) * t**i for i, c in enumerate(a.double().unbind(1)))
        bottom = (c.repeat_interleave(width) for c in b.double().unbind(1))
        return top / (1 + sum(c * t.abs() ** (i + 1) for i, c in enumerate(bottom)))

    errors = []
    for side in ("output", "input"):
        y = linear_rational(x, weight, bias, a, b, side=side, **config)
        left = x.double() if side == "output" else law(x.double()).half().double()
        expected = left @ weight.double().T + bias.double()
        expected = law(expected) if side == "output" else expected
        errors.append(float((y.double() - expected).norm() / expected.norm()))
    if not max(errors) < 1e-3:
        raise AssertionError(f"relative errors {errors}, expected below 1e-3")
    return max(errors)
