"""Attention over binary codes in Triton: sums over the keys, then one product per block of queries.

Law, with b = +1 where x > threshold and -1 elsewhere, per head:

    s[m,t]  = D + 1 + sum_i bq[m,i] bk[t,i]                                        (always > 0)
    out[m]  = sum_t s[m,t] v[t] / sum_t s[m,t]

taken in linear order, as additions alone:

    KV[i] = sum_t bk[t,i] v[t]     K1[i] = sum_t bk[t,i]     V1 = sum_t v[t]        (over keys)
    out[m] = ((D+1) V1 + sum_i bq[m,i] KV[i]) / ((D+1) N + sum_i bq[m,i] K1[i])     (over queries)

Sums are fp32, the result has the dtype of v. Multiplying by ±1 is how a matrix unit adds: 16-bit
values go through it as they are, fp32 ones (and KV) as three bf16 numbers that hold all 24 bits, so
that every product is exact and only sums round. On these machines that is the faster way: masked
additions would run on the vector units, at a sixteenth of the rate.

The keys are cut into chunks where heads alone do not fill the device; the chunks' sums are added in
a fixed order (`split_sum`), so that results repeat bitwise for one number of chunks.
Source: ShiftAddViT (the add layers), EcoFormer (the bias D + 1). This file needs only torch and
triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.codegen.triton.split_sum import quantized_linear_reduce

# The interpreter reads bf16 operands of `tl.dot` as integers; there the operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _codes(x, threshold, inside):
    """±1 as bf16 (exact), 0 outside; a NaN is above no threshold."""
    return tl.where(inside, tl.where(x.to(tl.float32) > threshold, 1.0, -1.0), 0.0).to(tl.bfloat16)


@triton.jit
def _dot(a, b, sums, UPCAST: tl.constexpr):
    if UPCAST:
        return sums + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _add(codes, values, sums, UPCAST: tl.constexpr):
    """sums + codes values: exact products, sums in fp32."""
    if values.dtype == tl.float32:
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums = _dot(codes, low, sums, UPCAST)
        sums = _dot(codes, middle, sums, UPCAST)
        sums = _dot(codes, high, sums, UPCAST)
    else:
        sums = _dot(codes.to(values.dtype), values, sums, UPCAST)
    return sums


@triton.jit
def binary_attention_keys(
    key_ptr,
    value_ptr,
    threshold_ptr,
    sums_ptr,
    heads,
    keys,
    keys_per_chunk,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ve,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (B*H, chunks). sums_ptr: fp32 [chunks, B*H*(D*E + D + E)], of a chunk KV [B*H,D,E],
    then K1 [B*H,D], then V1 [B*H,E]."""
    head = tl.program_id(0).to(tl.int64)
    every = tl.num_programs(0).to(tl.int64)
    i, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    t = tl.program_id(1) * keys_per_chunk + tl.arange(0, BLOCK_T)
    end = tl.minimum((tl.program_id(1) + 1) * keys_per_chunk, keys)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    value_ptr += head // heads * stride_vb + head % heads * stride_vh
    wide_t = t.to(tl.int64)
    key_tile = key_ptr + wide_t[None, :] * stride_kt + i[:, None] * stride_kd
    value_tile = value_ptr + wide_t[:, None] * stride_vt + e[None, :] * stride_ve
    threshold = tl.load(threshold_ptr + head % heads * D + i, mask=i < D, other=0.0)[:, None]

    kv = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    ones = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for _ in range(tl.program_id(1) * keys_per_chunk, end, BLOCK_T):
        inside = (i < D)[:, None] & (t < end)[None, :]
        codes = _codes(tl.load(key_tile, mask=inside, other=0.0), threshold, inside)
        in_value = (t < end)[:, None] & (e < E)[None, :]
        values = tl.load(value_tile, mask=in_value, other=0.0)
        kv = _add(codes, values, kv, UPCAST)
        ones += tl.sum(codes.to(tl.float32), 1)
        total += tl.sum(values.to(tl.float32), 0)
        t += BLOCK_T
        key_tile += BLOCK_T * stride_kt
        value_tile += BLOCK_T * stride_vt

    sums_ptr += tl.program_id(1) * every * (D * E + D + E)
    at = sums_ptr + head * (D * E) + i[:, None] * E + e[None, :]
    tl.store(at, kv, mask=(i < D)[:, None] & (e < E)[None, :])
    tl.store(sums_ptr + every * (D * E) + head * D + i, ones, mask=i < D)
    tl.store(sums_ptr + every * (D * E + D) + head * E + e, total, mask=e < E)


@triton.jit
def binary_attention_queries(
    query_ptr,
    threshold_ptr,
    sums_ptr,
    out_ptr,
    heads,
    queries,
    keys,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_ob,
    stride_oh,
    stride_om,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (B*H, ceil(M / BLOCK_M)). sums_ptr: the chunks' sums, laid out as one chunk's."""
    head = tl.program_id(0).to(tl.int64)
    every = tl.num_programs(0).to(tl.int64)
    i, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m, wide_m = (m < queries)[:, None], m.to(tl.int64)[:, None]
    query_ptr += head // heads * stride_qb + head % heads * stride_qh
    inside = in_m & (i < D)[None, :]
    x = tl.load(query_ptr + wide_m * stride_qm + i[None, :] * stride_qd, mask=inside, other=0.0)
    threshold = tl.load(threshold_ptr + head % heads * D + i, mask=i < D, other=0.0)[None, :]
    codes = _codes(x, threshold, inside)

    at = sums_ptr + head * (D * E) + i[:, None] * E + e[None, :]
    kv = tl.load(at, mask=(i < D)[:, None] & (e < E)[None, :], other=0.0)
    ones = tl.load(sums_ptr + every * (D * E) + head * D + i, mask=i < D, other=0.0)
    total = tl.load(sums_ptr + every * (D * E + D) + head * E + e, mask=e < E, other=0.0)
    top = _add(codes, kv, tl.zeros((BLOCK_M, BLOCK_E), tl.float32), UPCAST)
    top += (D + 1) * total[None, :]
    bottom = (D + 1) * keys.to(tl.float32) + tl.sum(codes.to(tl.float32) * ones[None, :], 1)
    out_ptr += head // heads * stride_ob + head % heads * stride_oh
    tl.store(
        out_ptr + wide_m * stride_om + e[None, :],
        (top / bottom[:, None]).to(out_ptr.dtype.element_ty),
        mask=in_m & (e < E)[None, :],
    )


def binary_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_threshold: Tensor,
    key_threshold: Tensor,
    *,
    block_t: int,
    block_m: int,
    num_warps: int,
    num_stages: int,
    splits: int = 1,
) -> Tensor:
    """Launches both kernels, and the sum of the chunks between them where splits > 1.

    query [B,H,M,D], key [B,H,N,D], value [B,H,N,E] fp16, bf16 or fp32, any strides; thresholds
    [H,D], read as fp32. Returns [B,H,M,E] in value's dtype, heads side by side in memory.
    """
    (batch, heads, queries, d), (keys, e) = query.shape, value.shape[2:]
    out = value.new_empty(batch, queries, heads, e).transpose(1, 2)
    if out.numel() == 0:
        return out
    blocks = {
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_E": max(16, triton.next_power_of_2(e)),
    }
    per_chunk = triton.cdiv(triton.cdiv(keys, block_t), splits) * block_t
    splits = triton.cdiv(keys, per_chunk)
    elements = batch * heads * (d * e + d + e)
    sums = value.new_empty(splits, elements, dtype=torch.float32)
    options = {"num_warps": num_warps, "num_stages": num_stages, "UPCAST": INTERPRETED}
    binary_attention_keys[(batch * heads, splits)](
        key,
        value,
        key_threshold.float().contiguous(),
        sums,
        heads,
        keys,
        per_chunk,
        *key.stride(),
        *value.stride(),
        D=d,
        E=e,
        BLOCK_T=block_t,
        **blocks,
        **options,
    )
    if splits > 1:
        parts, sums, block = sums, sums.new_empty(elements), 1024
        quantized_linear_reduce[(triton.cdiv(elements, block),)](
            parts, parts, sums, elements, elements, splits, BIAS=False, BLOCK=block
        )
    binary_attention_queries[(batch * heads, triton.cdiv(queries, block_m))](
        query,
        query_threshold.float().contiguous(),
        sums,
        out,
        heads,
        queries,
        keys,
        *query.stride(),
        *out.stride()[:3],
        D=d,
        E=e,
        BLOCK_M=block_m,
        **blocks,
        **options,
    )
    return out


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: two heads of 24 channels, 33 queries, 70 keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 33, 24, generator=generator)
    key, value = torch.randn(2, 2, 2, 70, 24, generator=generator)
    limits = 0.3 * torch.randn(2, 2, 24, generator=generator)
    tensors = (t.to(device) for t in (query, key, value, *limits))
    found = binary_attention(*tensors, **config).cpu().double()
    codes = [
        (x > limit.unsqueeze(-2)).double() * 2 - 1
        for x, limit in zip((query, key), limits, strict=True)
    ]
    scores = 25 + codes[0] @ codes[1].transpose(-1, -2)
    expected = scores @ value.double() / scores.sum(-1, keepdim=True)
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-5:
        raise AssertionError(f"relative error {error:.2e}, expected below 1e-5")
    return error
