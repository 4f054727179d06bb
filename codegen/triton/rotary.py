"""Rotary position embedding of queries and keys.

Law, on the first R of D features (the rest is copied):

    half-split    y[i] = x[i] c[i] - x[i+h] s[i],  y[i+h] = x[i+h] c[i+h] + x[i] s[i+h],  h = R/2
    interleaved   y[2i] = x[2i] c[2i] - x[2i+1] s[2i],  y[2i+1] = x[2i+1] c[2i+1] + x[2i] s[2i+1]

Arithmetic in fp32, one rounding. A program takes one position for a block of the heads of q and k;
a block of features is read beside its partner, which lies in the same cache lines. Source: Su et
al., RoFormer. This file needs only torch and triton.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def rotary_heads(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    heads,
    key_heads,
    length,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (B S, ceil(H / BLOCK_H) + ceil(Hk / BLOCK_H)). Outputs contiguous [B,S,heads,D]."""
    position = tl.program_id(0).to(tl.int64)
    batch = position // length
    s = position % length
    block = tl.program_id(1)
    query_blocks = tl.cdiv(heads, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    turned = d < R
    if INTERLEAVED:
        partner = d ^ 1
        first = (d & 1) == 0
    else:
        first = d < R // 2
        partner = tl.where(first, d + R // 2, d - R // 2)
    c = tl.load(cos_ptr + batch * stride_cb + s * stride_cs + d, mask=turned, other=1.0)
    t = tl.load(sin_ptr + batch * stride_sb + s * stride_ss + d, mask=turned, other=0.0)
    c = c.to(tl.float32)
    t = t.to(tl.float32)
    t = tl.where(first, -t, t)
    if block < query_blocks:
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        row = q_ptr + batch * stride_qb + s * stride_qs + h.to(tl.int64)[:, None] * stride_qh
        keep = (h < heads)[:, None]
        out = q_out_ptr + (position * heads + h[:, None]) * D
    else:
        h = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        row = k_ptr + batch * stride_kb + s * stride_ks + h.to(tl.int64)[:, None] * stride_kh
        keep = (h < key_heads)[:, None]
        out = k_out_ptr + (position * key_heads + h[:, None]) * D
    x = tl.load(row + d[None, :], mask=keep & in_d[None, :], other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=keep & turned[None, :], other=0.0).to(tl.float32)
    y = (x * c[None, :] + other * t[None, :]).to(q_out_ptr.dtype.element_ty)
    tl.store(out + d[None, :], y, mask=keep & in_d[None, :])


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    block_h: int,
    num_warps: int,
    num_stages: int,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. q [B,H,S,D], k [B,Hk,S,D], cos, sin [1|B,S,R].

    Returns both turned, in memory [B,S,heads,D].
    """
    batch, heads, length, dim = q.shape
    key_heads, size = k.shape[1], cos.shape[-1]
    q_out = q.new_empty(batch, length, heads, dim)
    k_out = q.new_empty(batch, length, key_heads, dim)
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    cos, sin = (x.expand(batch, length, size) for x in (cos, sin))
    blocks = triton.cdiv(heads, block_h) + triton.cdiv(key_heads, block_h)
    if q_out.numel() or k_out.numel():
        rotary_heads[(batch * length, blocks)](
            q, k, cos, sin, q_out, k_out, heads, key_heads, length,
            *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            INTERLEAVED=interleaved, D=dim, R=size, BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_H=block_h, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def self_check(device: str, **config: int) -> float:
    """Relative Frobenius error against float64: partial rotation of nine heads and three."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    q, k = normal(2, 7, 9, 48).transpose(1, 2), normal(2, 3, 7, 48)
    cos, sin = normal(1, 7, 32), normal(1, 7, 32)
    worst = 0.0
    for x, y in zip((q, k), rotary(q, k, cos, sin, interleaved=False, **config), strict=True):
        part = x[..., :32].double()
        turned = torch.cat((-part[..., 16:], part[..., :16]), -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        expected = torch.cat((part * c + turned * s, x[..., 32:].double()), -1)
        worst = max(worst, float((y.double() - expected).norm() / expected.norm()))
    if not worst < 1e-3:
        raise AssertionError(f"relative error {worst:.2e}, expected below 1e-3")
    return worst
