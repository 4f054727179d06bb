"""Attention as one operation.

Law, for query head h of H reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    z[i,j] excluded unless j <= i + diagonal        (diagonal None: every j is kept)
    out[i] = sum_j softmax_j(z[i,:])[j] * v[j]      (a row with every j excluded gives 0)

`diagonal` counts as in `torch.tril`: 0 is the top-left alignment of
`scaled_dot_product_attention(is_causal=True)`, Sk - Sq the bottom-right one of FlashAttention-2.
Scores and softmax are fp32 (fp64 for fp64 inputs); the output has the query's dtype.
Source: Dao, FlashAttention-2, sections 3.1-3.2.
"""

import torch
from torch import Tensor

from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import Op


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, diagonal: int | None
) -> Tensor:
    """z[B,H,Sq,Sk] with excluded entries at -inf, in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * (query.to(wide) @ key.to(wide).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    if diagonal is not None:
        rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        columns = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(columns > rows + diagonal, -torch.inf)
    return scores


def _probabilities(scores: Tensor) -> Tensor:
    """softmax over the last dimension; a row that is all -inf gives zeros, not NaN."""
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
) -> Tensor:
    """The law above in plain torch.

    query [B,H,Sq,D], key [B,Hk,Sk,D], value [B,Hk,Sk,Dv] with H % Hk == 0, one dtype, any strides;
    mask boolean or floating, broadcastable to [B,H,Sq,Sk]. Returns [B,H,Sq,Dv], query's dtype, in
    memory [B,Sq,H,Dv].
    """
    p = _probabilities(_scores(query, key, mask, scale, diagonal))
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = _fake(query, key, value, mask, scale=scale, diagonal=diagonal)
    return out.copy_(p @ value.to(p.dtype))


def _fake(query, key, value, mask=None, *, scale, diagonal=None):
    return heads_side_by_side(query, (*query.shape[:-1], value.shape[-1]))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    query, key, value, mask = inputs
    ctx.save_for_backward(query, key, value, mask, output)
    ctx.scale, ctx.diagonal = keyword_only_inputs["scale"], keyword_only_inputs["diagonal"]


def _backward(ctx, grad):
    """dV = PᵀdO;  dS = P∘(dO Vᵀ - Δ), Δ = rowsum(dO∘O);  dQ = scale dS K;  dK = scale dSᵀQ."""
    query, key, value, mask, output = ctx.saved_tensors
    group = query.shape[1] // key.shape[1]
    p = _probabilities(_scores(query, key, mask, ctx.scale, ctx.diagonal))
    wide_grad = grad.to(p.dtype)
    wide_key = key.repeat_interleave(group, dim=1).to(p.dtype)
    wide_value = value.repeat_interleave(group, dim=1).to(p.dtype)
    delta = (wide_grad * output.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (wide_grad @ wide_value.transpose(-1, -2) - delta)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    d_query = (ctx.scale * ds @ wide_key).to(query.dtype)
    d_key = per_key_head(ctx.scale * ds.transpose(-1, -2) @ query.to(p.dtype)).to(key.dtype)
    d_value = per_key_head(p.transpose(-1, -2) @ wide_grad).to(value.dtype)
    d_mask = None
    if mask is not None and ctx.needs_input_grad[3]:
        d_mask = ds.sum_to_size(mask.shape).to(mask.dtype)
    return d_query, d_key, d_value, d_mask


ATTENTION = Op(
    schema=(
        "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, *,"
        " float scale, SymInt? diagonal=None) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
