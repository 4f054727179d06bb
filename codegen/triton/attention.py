"""FlashAttention-2 forward in Triton: one pass over the keys, nothing of size Sq x Sk in memory.

Law, for query head h reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    or soft_cap * tanh(scale * q[i]·k[j] / soft_cap) + mask[i,j]
    z[i,j] excluded unless j <= i + diagonal        (diagonal None: every j is kept)
    out[i] = sum_j p[i,j] * v[j]                    (a row with every j excluded gives 0)
    p[i,j] = exp(z[i,j] - lse[i])
    lse[i] = log(sum_j exp(z[i,j]) + exp(sinks[h])) (no sinks: without that term), kept as the row's
                                                     maximum and what is left, whose sum it is; 0
                                                     and inf for a row with nothing in the sum

q [B,H,Sq,D], k [B,Hk,Sk,D], v [B,Hk,Sk,Dv]; fp16, bf16 or fp32, any strides; scores, softmax and
accumulation in fp32; fp32 inputs are multiplied in IEEE fp32, never in TF32. sinks [H].
Source: Dao, FlashAttention-2, sections 3.1-3.2.

One program owns BLOCK_M query rows of one head. Key tiles that lie wholly inside the band are
taken first, with no comparison and no load predicate; the tiles on its edge follow; tiles outside
it are never touched. A sink has no value, so it joins the sum last. This file needs only torch and
triton.
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
def _attend(
    accumulator,
    peak,
    total,
    query,
    key_ptr,
    value_ptr,
    mask_ptr,
    key_tile,
    value_tile,
    mask_tile,
    first,
    last,
    rows,
    in_rows,
    in_d,
    in_dv,
    key_length,
    diagonal,
    scale,
    soft_cap,
    stride_kn,
    stride_vn,
    stride_mask_n,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    ON_EDGE: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Folds key tiles [first, last) into the running softmax (accumulator, peak, total).

    `peak` has the unit of the scores: raw q·k, or z itself where a mask is added or scores are
    capped; for these `scale` is the law's over the cap.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_columns = columns < key_length
        if ON_EDGE:
            key = tl.load(key_ptr + key_tile, mask=in_d[:, None] & in_columns[None, :], other=0.0)
        elif PAD_D:
            key = tl.load(key_ptr + key_tile, mask=in_d[:, None], other=0.0)
        else:
            key = tl.load(key_ptr + key_tile)
        z = _dot(query, key, UPCAST_DOT)
        if CAPPED:
            z = soft_cap * _tanh(z * scale)
        elif MASK == 2:
            z = z * scale
        if MASK != 0:
            if ON_EDGE:
                extra = tl.load(
                    mask_ptr + mask_tile, mask=in_rows[:, None] & in_columns[None, :], other=0
                )
            else:
                extra = tl.load(mask_ptr + mask_tile, mask=in_rows[:, None], other=0)
            # NOT multiplied by log2(e) yet: finfo.min would overflow to -inf and exclude.
            z = z + extra.to(tl.float32) if MASK == 2 else tl.where(extra != 0, z, float("-inf"))
        if ON_EDGE:
            keep = in_columns[None, :]
            if CAUSAL:
                keep = keep & (columns[None, :] <= rows[:, None] + diagonal)
            z = tl.where(keep, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, 1))
        if ON_EDGE or MASK != 0:  # a row may have met nothing but excluded keys: avoid inf - inf
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            anchor = new_peak
        if MASK == 2 or CAPPED:
            decay = tl.math.exp2((peak - anchor) * LOG2E)
            p = tl.math.exp2((z - anchor[:, None]) * LOG2E)
        else:  # one fused multiply-add per score
            unit = scale * LOG2E
            decay = tl.math.exp2((peak - anchor) * unit)
            p = tl.math.exp2(z * unit - (anchor * unit)[:, None])
        total = total * decay + tl.sum(p, 1)
        if ON_EDGE:
            value = tl.load(
                value_ptr + value_tile, mask=in_columns[:, None] & in_dv[None, :], other=0.0
            )
        elif PAD_DV:
            value = tl.load(value_ptr + value_tile, mask=in_dv[None, :], other=0.0)
        else:
            value = tl.load(value_ptr + value_tile)
        accumulator = accumulator * decay[:, None]
        p = p.to(value.dtype)
        if UPCAST_DOT:
            accumulator += _dot(p, value, UPCAST_DOT)
        else:
            accumulator = tl.dot(p, value, accumulator, input_precision="ieee")
        peak = new_peak
        # The bases advance by one tile: 32-bit offsets inside a tile (registers) never overflow.
        key_ptr += BLOCK_N * stride_kn
        value_ptr += BLOCK_N * stride_vn
        if MASK != 0:
            mask_ptr += BLOCK_N * stride_mask_n
    return accumulator, peak, total, key_ptr, value_ptr, mask_ptr


@triton.jit
def attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    sinks_ptr,
    out_ptr,
    stats_ptr,
    heads,
    key_heads,
    query_length,
    key_length,
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
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Grid: (ceil(Sq / BLOCK_M) * B * H,). The law stands at the top of this file."""
    row_tiles = tl.cdiv(query_length, BLOCK_M)
    tile = tl.program_id(0) % row_tiles
    if CAUSAL:  # long rows first, so that the last wave is made of short ones
        tile = row_tiles - 1 - tile
    batch = (tl.program_id(0) // row_tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // row_tiles % heads).to(tl.int64)
    key_head = head // (heads // key_heads)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    in_rows = rows < query_length
    in_d = d < D
    in_dv = dv < DV

    query_ptr += batch * stride_qb + head * stride_qh
    key_ptr += batch * stride_kb + key_head * stride_kh
    value_ptr += batch * stride_vb + key_head * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    query = tl.load(
        query_ptr + wide_rows[:, None] * stride_qm + d[None, :] * stride_qd,
        mask=in_rows[:, None] & in_d[None, :],
        other=0.0,
    )
    key_tile = columns[None, :] * stride_kn + d[:, None] * stride_kd
    value_tile = columns[:, None] * stride_vn + dv[None, :] * stride_vd
    mask_tile = tl.arange(0, BLOCK_M)[:, None] * stride_mask_m + columns[None, :] * stride_mask_n
    if MASK != 0:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
        mask_ptr += (tile * BLOCK_M).to(tl.int64) * stride_mask_m

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    # [0, inside) needs no comparison, [inside, stop) does, [stop, Sk) is excluded for every row.
    stop = key_length
    inside = key_length // BLOCK_N * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(stop, tl.maximum((tile + 1) * BLOCK_M + diagonal, 0))
        kept_by_all = tl.maximum(tile * BLOCK_M + diagonal + 1, 0)
        inside = tl.minimum(inside, kept_by_all // BLOCK_N * BLOCK_N)
    accumulator, peak, total, key_ptr, value_ptr, mask_ptr = _attend(
        accumulator, peak, total, query, key_ptr, value_ptr, mask_ptr,
        key_tile, value_tile, mask_tile, 0, inside,
        rows, in_rows, in_d, in_dv, key_length, diagonal, scale, soft_cap,
        stride_kn, stride_vn, stride_mask_n,
        CAUSAL, MASK, CAPPED, False, BLOCK_D != D, BLOCK_DV != DV, BLOCK_N, UPCAST_DOT,
    )  # fmt: skip
    accumulator, peak, total, key_ptr, value_ptr, mask_ptr = _attend(
        accumulator, peak, total, query, key_ptr, value_ptr, mask_ptr,
        key_tile, value_tile, mask_tile, inside, stop,
        rows, in_rows, in_d, in_dv, key_length, diagonal, scale, soft_cap,
        stride_kn, stride_vn, stride_mask_n,
        CAUSAL, MASK, CAPPED, True, BLOCK_D != D, BLOCK_DV != DV, BLOCK_N, UPCAST_DOT,
    )  # fmt: skip

    natural = peak if MASK == 2 or CAPPED else peak * scale
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        natural = tl.where(total == 0.0, float("-inf"), natural)  # -inf * 0 would be NaN
        peak = tl.maximum(natural, sink)
        anchor = tl.where(peak == float("-inf"), 0.0, peak)
        decay = tl.exp(natural - anchor)
        total = total * decay + tl.exp(sink - anchor)
        accumulator = accumulator * decay[:, None]
        natural = peak
    empty = total == 0.0
    out = accumulator * tl.where(empty, 0.0, 1.0 / total)[:, None]
    tl.store(
        out_ptr + wide_rows[:, None] * stride_om + dv[None, :] * stride_od,
        out.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_dv[None, :],
    )
    stats_ptr += (batch * heads + head) * query_length
    tl.store(stats_ptr + wide_rows, tl.where(empty, 0.0, natural), mask=in_rows)
    stats_ptr += tl.num_programs(0).to(tl.int64) // row_tiles * query_length
    tl.store(stats_ptr + wide_rows, tl.where(empty, float("inf"), tl.log(total)), mask=in_rows)


def mask_operand(
    mask: Tensor | None, shape: tuple[int, ...]
) -> tuple[int, Tensor | None, tuple[int, ...]]:
    """(kind, what a kernel reads, its strides) of a mask that broadcasts to `shape`."""
    if mask is None:
        return NO_MASK, None, (0, 0, 0, 0)
    boolean, mask = mask.dtype == torch.bool, mask.expand(shape)
    strides = mask.stride()
    return (
        (BOOLEAN_MASK, mask.view(torch.uint8), strides) if boolean else (ADDED_MASK, mask, strides)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches `attention_forward`. Shapes and dtypes as in the law; any strides.

    mask: boolean or floating, broadcastable to [B,H,Sq,Sk]; sinks: floating, contiguous; out: where
    to write, any strides.
    Returns (out [B,H,Sq,Dv] in the query's dtype, its memory [B,Sq,H,Dv] if it is made here, and
    stats fp32 [2,B,H,Sq], the row's maximum and what lse adds to it).
    """
    batch, heads, query_length, head_dim = query.shape
    key_length, value_dim = value.shape[-2:]
    if scale < 0:  # the kernel compares raw scores, which needs a scale that keeps their order
        query, scale = -query, -scale
    if out is None:
        out = query.new_empty(batch, query_length, heads, value_dim).transpose(1, 2)
    stats = query.new_empty(2, batch, heads, query_length, dtype=torch.float32)
    if out.numel() == 0:
        return out, stats
    kind, mask, mask_strides = mask_operand(mask, (batch, heads, query_length, key_length))
    attention_forward[(triton.cdiv(query_length, block_m) * batch * heads,)](
        query,
        key,
        value,
        query if mask is None else mask,
        query if sinks is None else sinks,
        out,
        stats,
        heads,
        key.shape[1],
        query_length,
        key_length,
        0 if diagonal is None else diagonal,
        scale if soft_cap is None else scale / soft_cap,
        0.0 if soft_cap is None else soft_cap,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask_strides,
        *out.stride(),
        CAUSAL=diagonal is not None,
        MASK=kind,
        SINKS=sinks is not None,
        CAPPED=soft_cap is not None,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        UPCAST_DOT=INTERPRETED,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, stats


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64 on a ragged, grouped, causal problem."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    query, key, value = normal(2, 4, 70, 64), normal(2, 2, 133, 64), normal(2, 2, 133, 64)
    out, _ = attention(query, key, value, scale=1 / math.sqrt(64), diagonal=63, **config)
    wide_key, wide_value = (x.double().repeat_interleave(2, dim=1) for x in (key, value))
    scores = query.double() @ wide_key.transpose(-1, -2) / math.sqrt(64)
    kept = torch.ones(70, 133, dtype=torch.bool, device=device).tril(63)
    expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ wide_value
    error = float((out.double() - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-3")
    return error
