"""Group-wise rational function in Triton: forward, and a backward without atomics.

Law, for channel c of group g = c // (C / G), with z = |x| in form "abs_terms" and z = x otherwise:

    y = P(x) / Q(x),   P(x) = sum_{i=0..m} a[g,i] x^i
    "abs_terms":         Q(x) = 1 + sum_{i=1..n} |b[g,i]| |x|^i
    "abs_coefficients":  Q(x) = 1 + sum_{i=1..n} |b[g,i]| x^i
    "abs_sum":           Q(x) = 1 + |sum_{i=1..n} b[g,i] x^i|

    u = dy / Q,  w = -y u:   dx = P'(x) u + w Q'(x),   da_i = sum x^i u,   db_i = sum w dQ/db_i

x, dy [rows, C] fp16, bf16 or fp32, last dimension contiguous; a [1 or G, m+1], b [1 or G, n],
contiguous, n >= 1; arithmetic and sums fp32. sign(0) is SIGN0 in every derivative.

The backward has two stages. One program takes a chunk of rows of one group, keeps a tile of fp32
sums per coefficient in registers, and adds the tile as a tree once at its end; a second kernel adds
the chunks in a fixed order. Chunks depend on the shapes alone, so that results repeat bit for bit.
Source: Raffel and Chen, FlashKAT (2025), which keeps coefficients and sums on chip but ends in one
atomic addition per program and coefficient. This file needs only torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FORMS = ("abs_terms", "abs_coefficients", "abs_sum")
REDUCE_BLOCK = 1024
MOST_STEPS = 16
"""Tiles of rows that one program of the backward adds, at most: the length of a chain of sums."""
PROGRAMS = 512
"""Programs below which chunks are made smaller."""


@triton.jit
def _sign(x, SIGN0: tl.constexpr):
    """sign(x), with sign(0) = SIGN0."""
    sign = tl.where(x < 0, -1.0, 1.0)
    return sign if SIGN0 == 1 else tl.where(x == 0, 0.0, sign)


@triton.jit
def _row(pointer, COUNT: tl.constexpr, MAGNITUDE: tl.constexpr):
    """COUNT numbers as a tuple of fp32 scalars, without their signs where MAGNITUDE."""
    row = ()
    for i in tl.static_range(COUNT):
        value = tl.load(pointer + i).to(tl.float32)
        row = row + (tl.abs(value) if MAGNITUDE else value,)  # noqa: RUF005
    return row


@triton.jit
def group_rational_forward(
    x_ptr,
    numerator_ptr,
    denominator_ptr,
    y_ptr,
    rows,
    stride_x,
    M: tl.constexpr,
    N: tl.constexpr,
    FORM: tl.constexpr,
    SHARED_A: tl.constexpr,
    SHARED_B: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y [rows, C] contiguous. Grid: (ceil(rows / BLOCK_M), G)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    a = _row(numerator_ptr + (0 if SHARED_A else group * (M + 1)), M + 1, False)
    c = _row(denominator_ptr + (0 if SHARED_B else group * N), N, FORM != 2)
    for start in range(0, WIDTH, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (row < rows)[:, None]
        if WIDTH % BLOCK_C != 0:
            inside = inside & (column < WIDTH)[None, :]
        at = group * WIDTH + column[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.abs(x) if FORM == 0 else x
        top = tl.zeros_like(x) + a[M]
        for i in tl.static_range(M):
            top = top * x + a[M - 1 - i]
        bottom = z * c[N - 1]
        for i in tl.static_range(N - 1):
            bottom = (bottom + c[N - 2 - i]) * z
        bottom = 1.0 + (tl.abs(bottom) if FORM == 2 else bottom)
        y = (top / bottom).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * (WIDTH * GROUPS) + at, y, mask=inside)


@triton.jit
def group_rational_backward_part(
    grad_ptr,
    x_ptr,
    numerator_ptr,
    denominator_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    stride_grad,
    stride_x,
    steps,
    M: tl.constexpr,
    N: tl.constexpr,
    FORM: tl.constexpr,
    SIGN0: tl.constexpr,
    SHARED_A: tl.constexpr,
    SHARED_B: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx [rows, C] contiguous, and partial fp32 [m+1+n, G, chunks], without the sign of b.

    Grid: (chunks, G), a chunk being steps * BLOCK_M rows.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    group = tl.program_id(1)
    a = _row(numerator_ptr + (0 if SHARED_A else group * (M + 1)), M + 1, False)
    c = _row(denominator_ptr + (0 if SHARED_B else group * N), N, FORM != 2)
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    sums = ()
    for _ in tl.static_range(M + 1 + N):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_C), tl.float32),)  # noqa: RUF005
    for step in range(steps * COLUMNS):
        tile = chunk * steps + step // COLUMNS
        row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = step % COLUMNS * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (row < rows)[:, None]
        if WIDTH % BLOCK_C != 0:
            inside = inside & (column < WIDTH)[None, :]
        at = group * WIDTH + column[None, :]
        # Outside, dy is 0 and with it every term.
        x = tl.load(x_ptr + row[:, None] * stride_x + at, mask=inside, other=0.0)
        dy = tl.load(grad_ptr + row[:, None] * stride_grad + at, mask=inside, other=0.0)
        x = x.to(tl.float32)
        z = tl.abs(x) if FORM == 0 else x
        p = tl.zeros_like(x) + a[M]
        dp = tl.zeros_like(x)
        for i in tl.static_range(M):
            dp = dp * x + p
            p = p * x + a[M - 1 - i]
        t = tl.zeros_like(x) + c[N - 1]
        dt = t
        for i in tl.static_range(N - 1):
            t = t * z + c[N - 2 - i]
            dt = dt * z + t
        t = t * z
        reciprocal = 1.0 / (1.0 + (tl.abs(t) if FORM == 2 else t))
        u = dy.to(tl.float32) * reciprocal
        w = -(p * reciprocal) * u
        if FORM == 2:
            w = w * _sign(t, SIGN0)
        inner = w * _sign(x, SIGN0) if FORM == 0 else w
        dx = (dp * u + dt * inner).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row[:, None] * (WIDTH * GROUPS) + at, dx, mask=inside)
        added = ()
        for i in tl.static_range(M + 1):
            added = added + (sums[i] + u,)  # noqa: RUF005
            u = u * x
        for i in tl.static_range(N):
            w = w * z
            added = added + (sums[M + 1 + i] + w,)  # noqa: RUF005
        sums = added
    for i in tl.static_range(M + 1 + N):
        total = tl.sum(tl.sum(sums[i], 1), 0)
        tl.store(partial_ptr + (i * GROUPS + group) * chunks + chunk, total)


@triton.jit
def group_rational_backward_sum(
    partial_ptr,
    denominator_ptr,
    d_numerator_ptr,
    d_denominator_ptr,
    chunks,
    M: tl.constexpr,
    N: tl.constexpr,
    FORM: tl.constexpr,
    SIGN0: tl.constexpr,
    SHARED_A: tl.constexpr,
    SHARED_B: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """da and db from `partial`, always in the same order. Grid: (m+1+n, G).

    A shared coefficient takes the sum over all groups, which lie side by side.
    """
    term, group = tl.program_id(0), tl.program_id(1)
    shared = SHARED_A if term <= M else SHARED_B
    count = chunks * GROUPS if shared else chunks
    if (group == 0) | (not shared):
        start = partial_ptr + (term * GROUPS + group).to(tl.int64) * chunks
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            sums += tl.load(start + at, mask=at < count, other=0.0)
        total = tl.sum(sums, 0)
        if term <= M:
            at_a = group * (M + 1) + term
            tl.store(d_numerator_ptr + at_a, total.to(d_numerator_ptr.dtype.element_ty))
        else:
            at_b = group * N + term - (M + 1)
            if FORM != 2:
                total = total * _sign(tl.load(denominator_ptr + at_b).to(tl.float32), SIGN0)
            tl.store(d_denominator_ptr + at_b, total.to(d_denominator_ptr.dtype.element_ty))


def _rows(x: Tensor) -> Tensor:
    """x as [rows, C], last dimension contiguous; copied only where no view has that shape."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _shape(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> dict[str, int]:
    groups = max(numerator.shape[0], denominator.shape[0])
    return {
        "M": numerator.shape[1] - 1,
        "N": denominator.shape[1],
        "FORM": FORMS.index(form),
        "SHARED_A": numerator.shape[0] == 1,
        "SHARED_B": denominator.shape[0] == 1,
        "WIDTH": x.shape[-1] // groups,
        "GROUPS": groups,
    }


def group_rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = FORMS[0],
    block_m: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """y of the law; x [..., C] of any strides, numerator and denominator contiguous, n >= 1."""
    y = x.new_empty(x.shape)
    shape = _shape(x, numerator, denominator, form)
    x = _rows(x)
    if x.numel():
        group_rational_forward[(triton.cdiv(x.shape[0], block_m), shape["GROUPS"])](
            x, numerator, denominator, y, x.shape[0], x.stride(0),
            **shape, BLOCK_M=block_m, BLOCK_C=block_c,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return y


def group_rational_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = FORMS[0],
    sign0: int = 1,
    block_m: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da, db) of the law, each of its operand's shape and dtype; grad has x's shape."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(numerator), torch.zeros_like(denominator)
    da, db = torch.empty_like(numerator), torch.empty_like(denominator)
    shape = _shape(x, numerator, denominator, form)
    grad, x = _rows(grad), _rows(x)
    tiles, groups = triton.cdiv(x.shape[0], block_m), shape["GROUPS"]
    steps = min(MOST_STEPS, max(1, tiles * groups // PROGRAMS))
    chunks = triton.cdiv(tiles, steps)
    terms = shape["M"] + 1 + shape["N"]
    partial = x.new_empty(terms, groups, chunks, dtype=torch.float32)
    group_rational_backward_part[(chunks, groups)](
        grad, x, numerator, denominator, dx, partial,
        x.shape[0], grad.stride(0), x.stride(0), steps,
        **shape, SIGN0=sign0, BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    del shape["WIDTH"]
    group_rational_backward_sum[(terms, groups)](
        partial, denominator, da, db, chunks, **shape, SIGN0=sign0, BLOCK=REDUCE_BLOCK
    )
    return dx, da, db


def self_check(device: str, **config: int) -> float:
    """Largest relative Frobenius error of y, dx, da and db against float64, 300 x 48, 2 groups."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 300, 48, generator=generator)
    a = torch.randn(2, 6, generator=generator)
    b = torch.rand(2, 4, generator=generator) + 0.1
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    xs = wide[0].reshape(300, 2, 24)
    top = sum(wide[1][:, i, None] * xs**i for i in range(6))
    bottom = 1 + sum(wide[2][:, i - 1, None] * xs.abs() ** i for i in range(1, 5))
    y = (top / bottom).reshape(x.shape)
    expected = (y.detach(), *torch.autograd.grad(y, wide, grad.double()))
    x, grad, a, b = (t.to(device) for t in (x, grad, a, b))
    found = (
        group_rational(x, a, b, **config),
        *group_rational_backward(grad, x, a, b, **config),
    )
    error = max(
        float((f.cpu().double() - e).norm() / e.norm())
        for f, e in zip(found, expected, strict=True)
    )
    if not error < 1e-5:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-5")
    return error
