"""Attention of few query rows over many keys (decoding): the keys are cut into parts.

Law, for query head h reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    or soft_cap * tanh(scale * q[i]·k[j] / soft_cap) + mask[i,j]
    z[i,j] excluded unless j <= i + diagonal        (diagonal None: every j is kept)
    p[i,j] = exp(z[i,j]) / (sum_n exp(z[i,n]) + exp(sinks[h]))      (no sinks: without that term)
    out[i] = sum_j p[i,j] * v[j]                    (a row with every j excluded gives 0)

One program takes one part of the keys for ALL query rows of one key head (the H / Hk heads of the
group times Sq), so that each key is read once. Part s leaves, unnormalised in fp32,

    peak_s = max_j z[i,j],  total_s = sum_j exp(z[i,j] - peak_s),  o_s = sum_j exp(...) v[j]

and a second kernel adds the parts in a fixed order: out = sum_s w_s o_s / sum_s w_s total_s with
w_s = exp(peak_s - max_s peak_s). A sink is one more part, of peak sinks[h], total 1 and o 0. No
atomics, hence bitwise repeatable for one number of parts.
Source: Dao, Flash-Decoding. This file needs only torch and triton.
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter reads bf16 operands of `tl.dot` as integers; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

NO_MASK, BOOLEAN_MASK, ADDED_MASK = 0, 1, 2


@triton.jit
def _dot(a, b, UPCAST_DOT: tl.constexpr):
    if UPCAST_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tanh(y):
    """By an exponential that does not overflow; the error is that of 1 in fp32."""
    e = tl.math.exp2(tl.abs(y) * -2.8853900817779268)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -t, t)


@triton.jit
def attention_decode_part(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    heads,
    key_heads,
    query_length,
    key_length,
    keys_per_part,
    diagonal,
    scale,
    soft_cap,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Grid: (B * Hk, parts). partial fp32 [parts,B,H,Sq,Dv]; peak, total fp32 [parts,B,H,Sq]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    part = tl.program_id(1)
    group = heads // key_heads

    r = tl.arange(0, BLOCK_M)
    in_rows = r < group * query_length
    head = key_head * group + r // query_length
    i = r % query_length
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    in_d = d < D
    in_dv = dv < DV
    query_row = query_ptr + batch * stride_qb + head * stride_qh + i * stride_qm
    query = tl.load(
        query_row[:, None] + d[None, :] * stride_qd,
        mask=in_rows[:, None] & in_d[None, :],
        other=0.0,
    )
    begin = part * keys_per_part
    end = tl.minimum(begin + keys_per_part, key_length)
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(query_length + diagonal, 0))
    key_ptr += batch * stride_kb + key_head * stride_kh + begin.to(tl.int64) * stride_kn
    value_ptr += batch * stride_vb + key_head * stride_vh + begin.to(tl.int64) * stride_vn
    columns = tl.arange(0, BLOCK_N)
    key_tile = columns[None, :] * stride_kn + d[:, None] * stride_kd
    value_tile = columns[:, None] * stride_vn + dv[None, :] * stride_vd
    mask_row = mask_ptr + batch * stride_mask_b + head * stride_mask_h + i * stride_mask_m
    mask_row += begin.to(tl.int64) * stride_mask_n

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + columns
        in_columns = j < end
        key = tl.load(key_ptr + key_tile, mask=in_d[:, None] & in_columns[None, :], other=0.0)
        z = _dot(query, key, UPCAST_DOT) * scale
        if CAPPED:  # the scale is then the law's over the cap
            z = soft_cap * _tanh(z)
        keep = in_columns[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= i[:, None] + diagonal)
        if MASK != 0:
            extra = tl.load(
                mask_row[:, None] + columns[None, :] * stride_mask_n,
                mask=in_rows[:, None] & in_columns[None, :],
                other=0,
            )
            if MASK == 1:
                keep = keep & (extra != 0)
            else:
                z += extra.to(tl.float32)
        z = tl.where(keep, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, 1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # The difference first: finfo.min times log2(e) would overflow to -inf.
        decay = tl.math.exp2((peak - anchor) * LOG2E)
        p = tl.math.exp2((z - anchor[:, None]) * LOG2E)
        total = total * decay + tl.sum(p, 1)
        value = tl.load(
            value_ptr + value_tile, mask=in_columns[:, None] & in_dv[None, :], other=0.0
        )
        accumulator = accumulator * decay[:, None]
        accumulator += _dot(p.to(value.dtype), value, UPCAST_DOT)
        peak = new_peak
        key_ptr += BLOCK_N * stride_kn
        value_ptr += BLOCK_N * stride_vn
        mask_row += BLOCK_N * stride_mask_n

    batches = tl.num_programs(0) // key_heads
    row = ((part * batches + batch) * heads + head) * query_length + i
    tl.store(peak_ptr + row, peak, mask=in_rows)
    tl.store(total_ptr + row, total, mask=in_rows)
    tl.store(
        partial_ptr + row[:, None] * DV + dv[None, :],
        accumulator,
        mask=in_rows[:, None] & in_dv[None, :],
    )


@triton.jit
def attention_decode_combine(
    partial_ptr,
    peak_ptr,
    total_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    rows,
    parts,
    heads,
    query_length,
    SINKS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Grid: (rows,), rows = B * H * Sq. out contiguous [rows,Dv]; lse fp32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_PARTS)
    peaks = tl.load(peak_ptr + s * rows + row, mask=s < parts, other=float("-inf"))
    peak = tl.max(peaks, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + row // query_length % heads).to(tl.float32)
        peak = tl.maximum(peak, sink)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    if SINKS:
        total += tl.exp(sink - anchor)
    out = tl.zeros((BLOCK_DV,), tl.float32)
    for part in range(parts):
        at = row + part * rows
        weight = tl.exp(tl.load(peak_ptr + at) - anchor)
        total += weight * tl.load(total_ptr + at)
        out += weight * tl.load(partial_ptr + at * DV + dv, mask=dv < DV, other=0.0)
    out *= tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(out_ptr + row * DV + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    lse = tl.where(total == 0.0, float("inf"), peak + tl.log(total))
    tl.store(lse_ptr + row, lse)


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
    splits: int,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor]:
    """Launches both kernels. Shapes and dtypes as `attention`; H / Hk * Sq at most block_m.

    Returns (out [B,H,Sq,Dv] in the query's dtype, lse [B,H,Sq] fp32, +inf for an empty row).
    """
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = value.shape[1:]
    group_rows = heads // key_heads * query_length
    if group_rows > block_m:
        raise ValueError(f"expected at most block_m = {block_m} rows per head, found {group_rows}")
    out = query.new_empty(batch, heads, query_length, value_dim)
    lse = query.new_empty(batch, heads, query_length, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    # Whole tiles per part, and no part without keys.
    keys_per_part = max(1, triton.cdiv(triton.cdiv(key_length, block_n), splits)) * block_n
    parts = max(1, triton.cdiv(key_length, keys_per_part))
    partial = out.new_empty((parts, *out.shape), dtype=torch.float32)
    peak, total = lse.new_empty((2, parts, *lse.shape))
    kind = NO_MASK
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        kind = BOOLEAN_MASK if mask.dtype == torch.bool else ADDED_MASK
        mask = mask.expand(batch, heads, query_length, key_length)
        mask_strides = mask.stride()
        mask = mask.view(torch.uint8) if kind == BOOLEAN_MASK else mask
    block_dv = max(16, triton.next_power_of_2(value_dim))
    attention_decode_part[(batch * key_heads, parts)](
        query,
        key,
        value,
        query if mask is None else mask,
        partial,
        peak,
        total,
        heads,
        key_heads,
        query_length,
        key_length,
        keys_per_part,
        0 if diagonal is None else diagonal,
        scale if soft_cap is None else scale / soft_cap,
        0.0 if soft_cap is None else soft_cap,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask_strides,
        CAUSAL=diagonal is not None,
        MASK=kind,
        CAPPED=soft_cap is not None,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DV=block_dv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        UPCAST_DOT=INTERPRETED,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    rows = lse.numel()
    attention_decode_combine[(rows,)](
        partial,
        peak,
        total,
        lse if sinks is None else sinks,
        out,
        lse,
        rows,
        parts,
        heads,
        query_length,
        SINKS=sinks is not None,
        DV=value_dim,
        BLOCK_DV=block_dv,
        BLOCK_PARTS=128,
    )
    return out, lse


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: one token, four heads per key head, 300 keys."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    query, key, value = normal(2, 8, 1, 64), normal(2, 2, 300, 64), normal(2, 2, 300, 64)
    out, _ = attention_decode(query, key, value, scale=1 / math.sqrt(64), **config)
    wide_key, wide_value = (x.double().repeat_interleave(4, dim=1) for x in (key, value))
    scores = query.double() @ wide_key.transpose(-1, -2) / math.sqrt(64)
    expected = scores.softmax(-1) @ wide_value
    error = float((out.double() - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-3")
    return error
