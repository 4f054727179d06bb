"""FlashAttention-2 backward in Triton: two kernels, no atomics, the same numbers every time.

Law, with the forward's statistics m and log l (`attention`) and delta[i] = do[i]·o[i]:

    p[i,j]  = exp(z[i,j] - m[i] - log l[i]);  dp[i,j] = do[i]·v[j]
    ds[i,j] = scale p[i,j] (dp[i,j] - delta[i]) c'[i,j]
    dv[j]   = sum_i p[i,j] do[i];  dk[j] = sum_i ds[i,j] q[i];  dq[i] = sum_j ds[i,j] k[j]

c' = 1, or the slope 1 - tanh² of a soft cap; sums for dk and dv are over the query heads of a key
head too, in fp32. p and ds are rounded to the operands' dtype for the products, as in the forward.
Source: Dao, FlashAttention-2, section 3.1.2, whose dq is summed by atomics; here a second kernel
walks the keys for each tile of rows and forms z and dp again: 7 products instead of 5.

`attention_backward_keys` owns BLOCK_N keys of one key head and walks the query tiles that see them,
`attention_backward_queries` owns BLOCK_M rows of one query head. Tiles that the diagonal excludes
are never touched. This file needs only torch and triton.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.attention import INTERPRETED, _dot, _tanh, mask_operand


@triton.jit
def _soften(
    z, dp, peak, log_total, delta, extra, keep, scale, soft_cap,
    MASK: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """(p, ds) of a tile, from the products z = q·k and dp = do·v; statistics broadcast to it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if CAPPED:
        bent = _tanh(z * (scale / soft_cap))
        z = soft_cap * bent
        slope = scale * (1.0 - bent * bent)
    else:
        z = z * scale
        slope = scale
    if MASK == 2:
        z = z + extra.to(tl.float32)
    elif MASK == 1:
        keep = keep & (extra != 0)
    # 0 where a row sees no key at all: its log l is inf
    p = tl.where(keep, tl.math.exp2((z - peak - log_total) * LOG2E), 0.0)
    return p, p * (dp - delta) * slope


@triton.jit
def attention_backward_keys(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    grad_ptr,
    stats_ptr,
    delta_ptr,
    d_key_ptr,
    d_value_ptr,
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
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
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
    """Grid: (ceil(Sk / BLOCK_N) * B * Hk,). d_key, d_value [B,Hk,Sk,..] contiguous."""
    tiles = tl.cdiv(key_length, BLOCK_N)
    tile = tl.program_id(0) % tiles  # the first keys are seen by most rows: long ones first
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    group = heads // key_heads

    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_columns = columns.to(tl.int64)
    in_columns = columns < key_length
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_dv = d < D, dv < DV
    key_ptr += batch * stride_kb + key_head * stride_kh
    value_ptr += batch * stride_vb + key_head * stride_vh
    key = tl.load(
        key_ptr + wide_columns[:, None] * stride_kn + d[None, :] * stride_kd,
        mask=in_columns[:, None] & in_d[None, :],
        other=0.0,
    )
    value = tl.load(
        value_ptr + wide_columns[:, None] * stride_vn + dv[None, :] * stride_vd,
        mask=in_columns[:, None] & in_dv[None, :],
        other=0.0,
    )
    d_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_value = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(tile * BLOCK_N - diagonal, 0) // BLOCK_M * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    query_tile = lanes[:, None] * stride_qm + d[None, :] * stride_qd
    grad_tile = lanes[:, None] * stride_gm + dv[None, :] * stride_gd
    mask_tile = columns[:, None] * stride_mask_n + lanes[None, :] * stride_mask_m
    steps = tl.cdiv(tl.maximum(query_length - first, 0), BLOCK_M)
    plane = tl.num_programs(0).to(tl.int64) // tiles * group * query_length
    for step in range(steps * group):
        head = key_head * group + step // steps
        start = first + step % steps * BLOCK_M
        rows = start + lanes
        in_rows = rows < query_length
        wide_start = start.to(tl.int64)
        query = tl.load(
            query_ptr + batch * stride_qb + head * stride_qh + wide_start * stride_qm + query_tile,
            mask=in_rows[:, None] & in_d[None, :],
            other=0.0,
        )
        grad = tl.load(
            grad_ptr + batch * stride_gb + head * stride_gh + wide_start * stride_gm + grad_tile,
            mask=in_rows[:, None] & in_dv[None, :],
            other=0.0,
        )
        row_at = (batch * heads + head) * query_length + rows
        peak = tl.load(stats_ptr + row_at, mask=in_rows, other=0.0)
        log_total = tl.load(stats_ptr + plane + row_at, mask=in_rows, other=float("inf"))
        delta = tl.load(delta_ptr + row_at, mask=in_rows, other=0.0)
        keep = in_columns[:, None] & in_rows[None, :]
        if CAUSAL:
            keep = keep & (columns[:, None] <= rows[None, :] + diagonal)
        extra = 0
        if MASK != 0:
            at = batch * stride_mask_b + head * stride_mask_h + wide_start * stride_mask_m
            within = in_columns[:, None] & in_rows[None, :]
            extra = tl.load(mask_ptr + at + mask_tile, mask=within, other=0)
        z = _dot(key, tl.trans(query), UPCAST_DOT)
        dp = _dot(value, tl.trans(grad), UPCAST_DOT)
        p, ds = _soften(
            z, dp, peak[None, :], log_total[None, :], delta[None, :], extra, keep,
            scale, soft_cap, MASK, CAPPED,
        )  # fmt: skip
        d_value += _dot(p.to(grad.dtype), grad, UPCAST_DOT)
        d_key += _dot(ds.to(query.dtype), query, UPCAST_DOT)
    base = (batch * key_heads + key_head) * key_length
    tl.store(
        d_key_ptr + (base + wide_columns)[:, None] * D + d[None, :],
        d_key.to(d_key_ptr.dtype.element_ty),
        mask=in_columns[:, None] & in_d[None, :],
    )
    tl.store(
        d_value_ptr + (base + wide_columns)[:, None] * DV + dv[None, :],
        d_value.to(d_value_ptr.dtype.element_ty),
        mask=in_columns[:, None] & in_dv[None, :],
    )


@triton.jit
def attention_backward_queries(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    grad_ptr,
    stats_ptr,
    delta_ptr,
    d_query_ptr,
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
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
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
    """Grid: (ceil(Sq / BLOCK_M) * B * H,). d_query [B,H,Sq,D] contiguous."""
    tiles = tl.cdiv(query_length, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # long rows first
        tile = tiles - 1 - tile
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    key_head = head // (heads // key_heads)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    in_rows = rows < query_length
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_dv = d < D, dv < DV
    query_ptr += batch * stride_qb + head * stride_qh
    grad_ptr += batch * stride_gb + head * stride_gh
    query = tl.load(
        query_ptr + wide_rows[:, None] * stride_qm + d[None, :] * stride_qd,
        mask=in_rows[:, None] & in_d[None, :],
        other=0.0,
    )
    grad = tl.load(
        grad_ptr + wide_rows[:, None] * stride_gm + dv[None, :] * stride_gd,
        mask=in_rows[:, None] & in_dv[None, :],
        other=0.0,
    )
    row_at = (batch * heads + head) * query_length + rows
    peak = tl.load(stats_ptr + row_at, mask=in_rows, other=0.0)[:, None]
    plane = tl.num_programs(0).to(tl.int64) // tiles * query_length
    log_total = tl.load(stats_ptr + plane + row_at, mask=in_rows, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + row_at, mask=in_rows, other=0.0)
    d_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    key_ptr += batch * stride_kb + key_head * stride_kh
    value_ptr += batch * stride_vb + key_head * stride_vh
    key_tile = lanes[:, None] * stride_kn + d[None, :] * stride_kd
    value_tile = lanes[:, None] * stride_vn + dv[None, :] * stride_vd
    mask_tile = tl.arange(0, BLOCK_M)[:, None] * stride_mask_m + lanes[None, :] * stride_mask_n
    if MASK != 0:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
        mask_ptr += (tile * BLOCK_M).to(tl.int64) * stride_mask_m
    stop = key_length
    if CAUSAL:
        stop = tl.minimum(stop, tl.maximum((tile + 1) * BLOCK_M + diagonal, 0))
    for start in range(0, stop, BLOCK_N):
        columns = start + lanes
        in_columns = columns < key_length
        key = tl.load(key_ptr + key_tile, mask=in_columns[:, None] & in_d[None, :], other=0.0)
        value = tl.load(
            value_ptr + value_tile, mask=in_columns[:, None] & in_dv[None, :], other=0.0
        )
        keep = in_rows[:, None] & in_columns[None, :]
        if CAUSAL:
            keep = keep & (columns[None, :] <= rows[:, None] + diagonal)
        extra = 0
        if MASK != 0:
            within = in_rows[:, None] & in_columns[None, :]
            extra = tl.load(mask_ptr + mask_tile, mask=within, other=0)
        z = _dot(query, tl.trans(key), UPCAST_DOT)
        dp = _dot(grad, tl.trans(value), UPCAST_DOT)
        _, ds = _soften(
            z, dp, peak, log_total, delta[:, None], extra, keep, scale, soft_cap, MASK, CAPPED
        )
        d_query += _dot(ds.to(key.dtype), key, UPCAST_DOT)
        # The bases advance by one tile: 32-bit offsets inside a tile (registers) never overflow.
        key_ptr += BLOCK_N * stride_kn
        value_ptr += BLOCK_N * stride_vn
        if MASK != 0:
            mask_ptr += BLOCK_N * stride_mask_n
    base = (batch * heads + head) * query_length
    tl.store(
        d_query_ptr + (base + wide_rows)[:, None] * D + d[None, :],
        d_query.to(d_query_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_d[None, :],
    )


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    delta: Tensor,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
    keys: dict[str, int],
    queries: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches both kernels; shapes and dtypes as in the law, any strides.

    stats: of `attention`; delta: fp32 [B,H,Sq] contiguous. keys, queries: the kernels' launch
    configurations (block_m, block_n, num_warps, num_stages). Returns (dq, dk, dv), contiguous.
    """
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = value.shape[1:]
    d_query, d_key, d_value = (x.new_zeros(x.shape) for x in (query, key, value))
    if not (query.numel() and key.numel() and value.numel()):
        return d_query, d_key, d_value
    kind, mask, mask_strides = mask_operand(mask, (batch, heads, query_length, key_length))
    operands = (query, key, value, query if mask is None else mask, grad, stats, delta)
    sizes = (
        heads,
        key_heads,
        query_length,
        key_length,
        0 if diagonal is None else diagonal,
        scale,
        1.0 if soft_cap is None else soft_cap,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask_strides,
        *grad.stride(),
    )
    constants = {
        "CAUSAL": diagonal is not None,
        "MASK": kind,
        "CAPPED": soft_cap is not None,
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "UPCAST_DOT": INTERPRETED,
    }

    def blocks(config: dict[str, int]) -> dict[str, int]:
        return {name.upper() if "block" in name else name: size for name, size in config.items()}

    attention_backward_keys[(triton.cdiv(key_length, keys["block_n"]) * batch * key_heads,)](
        *operands, d_key, d_value, *sizes, **constants, **blocks(keys)
    )
    attention_backward_queries[(triton.cdiv(query_length, queries["block_m"]) * batch * heads,)](
        *operands, d_query, *sizes, **constants, **blocks(queries)
    )
    return d_query, d_key, d_value


def self_check(device: str, **config: int) -> float:
    """Largest relative Frobenius error of the gradients against float64, on a ragged, grouped,
    causal problem, both kernels in one configuration."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    query, key, value = normal(2, 4, 70, 64), normal(2, 2, 133, 64), normal(2, 2, 133, 64)
    grad, scale = normal(2, 4, 70, 64), 1 / math.sqrt(64)
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    wide_key, wide_value = (x.repeat_interleave(2, dim=1) for x in wide[1:])
    kept = torch.ones(70, 133, dtype=torch.bool, device=device).tril(63)
    scores = (wide[0] @ wide_key.transpose(-1, -2) * scale).masked_fill(~kept, -torch.inf)
    out = scores.softmax(-1) @ wide_value
    out.backward(grad.double())
    stats = torch.stack((torch.zeros(2, 4, 70, device=device), scores.logsumexp(-1).float()))
    delta = (grad.double() * out.detach()).sum(-1).float().contiguous()
    options = {"scale": scale, "diagonal": 63, "keys": config, "queries": config}
    found = attention_backward(grad, query, key, value, None, stats.detach(), delta, **options)
    errors = []
    for f, leaf in zip(found, wide, strict=True):
        assert leaf.grad is not None
        errors.append(float((f.double() - leaf.grad).norm() / leaf.grad.norm()))
    if not max(errors) < 1e-3:
        raise AssertionError(f"relative errors {errors}, expected below 1e-3")
    return max(errors)
