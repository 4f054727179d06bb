"""Rotary position embedding of queries and keys as one operation.

Law, on the first R of D features (the rest is copied), with position- and feature-wise c and s:

    y = x * c + rotate(x) * s
    half-split    rotate(x)[i] = -x[i + R/2], rotate(x)[i + R/2] = x[i]      i < R/2
    interleaved   rotate(x)[2i] = -x[2i + 1], rotate(x)[2i + 1] = x[2i]

c and s are used as they are given: no two of their entries are assumed to be equal. Arithmetic is
fp32 (fp64 for fp64 inputs) with one rounding, of y. Source: Su et al., RoFormer; the half-split
form is GPT-NeoX's, the interleaved one GPT-J's.
"""

import torch
from torch import Tensor

from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import Op


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """A quarter turn of each pair of features of x [..., R]."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    part, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    out = torch.cat(((part * c + rotate(part, interleaved) * s).to(x.dtype), rest), dim=-1)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The law above in plain torch.

    q [B,H,S,D], k [B,Hk,S,D] (Hk may be 0), one dtype, any strides; cos, sin [1|B,S,R], any
    floating dtypes, R <= D even. Returns tensors like q and k, in memory [B,S,heads,D].
    """
    return _turned(q, cos, sin, interleaved), _turned(k, cos, sin, interleaved)


def _fake(q, k, cos, sin, *, interleaved):
    return heads_side_by_side(q, q.shape), heads_side_by_side(k, k.shape)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.interleaved = keyword_only_inputs["interleaved"]


def _backward(ctx, d_q, d_k):
    """dx = dy c - rotate(dy s);  dc = sum_h dy x;  ds = sum_h dy rotate(x)."""
    q, k, cos, sin = ctx.saved_tensors
    size = cos.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    grads, d_cos, d_sin = [], torch.zeros_like(cos, dtype=wide), torch.zeros_like(sin, dtype=wide)
    for x, dy in ((q, d_q), (k, d_k)):
        dy, x = dy.to(wide), x.to(wide)
        part = dy[..., :size]
        dx = part * c - rotate(part * s, ctx.interleaved)
        grads.append(torch.cat((dx, dy[..., size:]), dim=-1).to(q.dtype))
        d_cos += (part * x[..., :size]).sum(1).sum_to_size(cos.shape)
        d_sin += (part * rotate(x[..., :size], ctx.interleaved)).sum(1).sum_to_size(sin.shape)
    return *grads, d_cos.to(cos.dtype), d_sin.to(sin.dtype)


ROTARY = Op(
    schema=(
        "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, bool interleaved)"
        " -> (Tensor, Tensor)"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
