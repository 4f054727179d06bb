"""AllReduce + residual + RMSNorm of partial sums in symmetric memory, in one kernel.

Law, for row t of T, N elements, W ranks with partial sums x_r, everything in fp32 (r in order):

    s = sum_r x_r[t] + residual[t];     residual'[t] = round(s)
    y[t] = round(s / sqrt(sum_n s[n]² / N + eps) * (shift + weight))

y is made of the unrounded s, so it carries one rounding where the separate kernels carry four.

    one-shot    every rank sums every row:  reads (W - 1) T N elements of its peers
    two-shot    rank r sums rows [r R, (r + 1) R), R = ceil(T / W), and writes y to every rank over
                the partial sums of that row, which nobody else reads
    multimem    as two-shot, with the switch summing and broadcasting (`multicast`), whose sum is
                rounded to x's type before the residual is added

One-shot returns y and residual' whole. In the others each rank has y whole, in its own symmetric
buffer, and of the residual its shard of R rows; rows that do not exist are left alone. The grid
must be the same on all ranks (it follows from T, N, W and the launch alone) and resident at once.
A barrier opens and closes the kernel (`signals`): the first says that all partial sums are there,
the last that all results are and that no buffer is still read. No atomics besides: repeatable.
Source: TokenWeave (Gond et al., arXiv:2505.11329), whose kernel rounds four times.
This file needs only torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.multicast import load_sum, store_all
from ridgeline.codegen.triton.signals import barrier

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIKE = ("rank", "rows", "multicast")
"""Numbers that Triton must not build into the code: every rank runs the same."""


@triton.jit
def _wide(row):
    """int64: all rows together may hold more than 2³¹ elements. A loop counter is a Python
    number in Triton's interpreter, which has no `to`."""
    return tl.full((), 0, tl.int64) + row


@triton.jit
def _peer(table_ptr, rank, dtype: tl.constexpr):
    """The address of a rank's buffer, which starts on 16 bytes."""
    address = tl.load(table_ptr + rank)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _sum_row(table_ptr, at, live, WORLD: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    """fp32 [BLOCK_N]: the sum of every rank's elements at `at`, in the order of the ranks."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for r in tl.static_range(WORLD):
        part = tl.load(_peer(table_ptr, r, dtype) + at, mask=live, other=0.0)
        total += part.to(tl.float32)
    return total


@triton.jit
def _norm_row(s, weight_ptr, column, inside, eps, shift, SIZE: tl.constexpr, WEIGHT: tl.constexpr):
    """fp32 [BLOCK_N]: y of one row, not yet rounded; s is 0 outside the row."""
    y = s * tl.math.rsqrt(tl.sum(s * s, 0) / SIZE + eps)
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + shift
    return y


@triton.jit(do_not_specialize=ALIKE)
def one_shot_norm(
    buffers_ptr,
    pads_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rank,
    rows,
    eps,
    shift,
    WORLD: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIGNALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (blocks,), equal on all ranks. buffers, pads: int64 [W] addresses of partial sums
    [T,N] and signal pads; residual, y, sum contiguous [T,N]; weight [N].

    SIGNALS off leaves out the barriers, for Triton's interpreter, which has no PTX.
    """
    if SIGNALS:
        barrier(pads_ptr, rank, WORLD)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_N)
    inside = column < SIZE
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = _wide(row) * SIZE + column
        s = _sum_row(buffers_ptr, at, inside, WORLD, dtype, BLOCK_N)
        s += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, s.to(dtype), mask=inside)
        y = _norm_row(s, weight_ptr, column, inside, eps, shift, SIZE, WEIGHT)
        tl.store(y_ptr + at, y.to(dtype), mask=inside)
    if SIGNALS:
        barrier(pads_ptr, rank, WORLD)


@triton.jit(do_not_specialize=ALIKE)
def two_shot_norm(
    buffers_ptr,
    multicast,
    pads_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    rank,
    rows,
    eps,
    shift,
    WORLD: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHT: tl.constexpr,
    MULTIMEM: tl.constexpr,
    SIGNALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (blocks,), equal on all ranks. buffers, pads: int64 [W] addresses; multicast: the
    address of the buffers' multicast mapping (MULTIMEM); residual, sum: the rank's shards
    [ceil(T/W),N], which may be one tensor; weight [N]. y replaces the partial sums.
    """
    if SIGNALS:
        barrier(pads_ptr, rank, WORLD)
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_N)
    inside = column < SIZE
    shard = tl.cdiv(rows, WORLD)
    first = rank * shard
    own = tl.minimum(shard, rows - first)  # negative for a rank without rows
    for row in range(tl.program_id(0), own, tl.num_programs(0)):
        start = _wide(first + row) * SIZE
        at, shard_at = start + column, _wide(row) * SIZE + column
        if MULTIMEM:
            address = multicast + start * (dtype.primitive_bitwidth // 8)
            s = load_sum(address, SIZE, BLOCK_N, dtype)
        else:
            s = _sum_row(buffers_ptr, at, inside, WORLD, dtype, BLOCK_N)
        s += tl.load(residual_ptr + shard_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + shard_at, s.to(dtype), mask=inside)
        y = _norm_row(s, weight_ptr, column, inside, eps, shift, SIZE, WEIGHT)
        if MULTIMEM:
            store_all(address, y, SIZE, BLOCK_N, dtype)
        else:
            for r in tl.static_range(WORLD):  # from the own rank on: no peer is met by all at once
                peer = _peer(buffers_ptr, (rank + r) % WORLD, dtype)
                tl.store(peer + at, y.to(dtype), mask=inside)
    if SIGNALS:
        barrier(pads_ptr, rank, WORLD)


def all_reduce_norm(
    variant: str,
    buffers: Tensor,
    multicast: int,
    pads: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    rank: int,
    rows: int,
    *,
    eps: float,
    shift: float,
    blocks: int,
    block_n: int,
    num_warps: int,
    num_stages: int = 1,
) -> tuple[Tensor | None, Tensor]:
    """Launches the kernel of `variant` on one rank, on `blocks` blocks, the same on all ranks.

    buffers, pads: int64 [W] addresses; residual contiguous, [T,N] (one-shot) or [ceil(T/W),N].
    Returns (y [T,N], residual') for one-shot and (None, residual') for the others, whose y is in
    the symmetric buffers. Barriers are left out in Triton's interpreter.
    """
    world, size = len(buffers), residual.shape[-1]
    total = torch.empty_like(residual)
    y = torch.empty_like(residual) if variant == "one_shot" else None
    common = {
        "WORLD": world,
        "SIZE": size,
        "WEIGHT": weight is not None,
        "SIGNALS": not INTERPRETED,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    tensors = (residual, residual if weight is None else weight)
    numbers = (rank, rows, eps, shift)
    if y is not None:
        one_shot_norm[(blocks,)](buffers, pads, *tensors, y, total, *numbers, **common)
    else:
        two_shot_norm[(blocks,)](
            buffers, multicast, pads, *tensors, total, *numbers,
            MULTIMEM=variant == "multimem", **common,
        )  # fmt: skip
    return y, total
