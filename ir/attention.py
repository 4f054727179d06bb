"""Attention as one operation.

Law, for query head h of H reading key/value head h // (H / Hk):

    z[i,j] = scale * q[i]·k[j] + mask[i,j]          (boolean mask: False -> excluded)
    or soft_cap * tanh(scale * q[i]·k[j] / soft_cap) + mask[i,j]
    z[i,j] excluded unless j <= i + diagonal        (diagonal None: every j is kept)
    p[i,j] = exp(z[i,j]) / (sum_n exp(z[i,n]) + exp(sinks[h]))      (no sinks: without that term)
    out[i] = sum_j p[i,j] * v[j]                    (a row with every j excluded gives 0)

`diagonal` counts as in `torch.tril`: 0 is the top-left alignment of
`scaled_dot_product_attention(is_causal=True)`, Sk - Sq the bottom-right one of FlashAttention-2.
A sink is the score, learned for each head, of a key that has no value: what it takes of a row's
weight is lost. A soft cap keeps the scores of keys, before the mask, within ±soft_cap. Scores and
softmax are fp32 (fp64 for fp64 inputs); the output has the query's dtype.
Sources: Dao, FlashAttention-2, sections 3.1-3.2; the sink as a score of its own is gpt-oss's form
of the attention sinks of Xiao et al., StreamingLLM, section 3; the soft cap is that of Gemma 2.
"""

import torch
from torch import Tensor

from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import Op


def _unmasked(query: Tensor, key: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """z[B,H,Sq,Sk] before anything is masked, in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * (query.to(wide) @ key.to(wide).transpose(-1, -2))
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def _masked(scores: Tensor, mask: Tensor | None, diagonal: int | None) -> Tensor:
    """z[B,H,Sq,Sk] with excluded entries at -inf."""
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if diagonal is not None:
        rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        columns = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(columns > rows + diagonal, -torch.inf)
    return scores


def _probabilities(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """p[B,H,Sq,Sk] and what the sinks take, [B,H,Sq,1]; a row that is all -inf gives zeros, not
    NaN."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
    return (p, None) if sinks is None else (p[..., :-1], p[..., -1:])


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The law above in plain torch.

    query [B,H,Sq,D], key [B,Hk,Sk,D], value [B,Hk,Sk,Dv] with H % Hk == 0, one dtype, any strides;
    mask boolean or floating, broadcastable to [B,H,Sq,Sk]; sinks [H] of any floating dtype.
    Returns [B,H,Sq,Dv], query's dtype, in memory [B,Sq,H,Dv].
    """
    scores = _masked(_unmasked(query, key, scale, soft_cap), mask, diagonal)
    p, _ = _probabilities(scores, sinks)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = _fake(query, key, value, scale=scale)
    return out.copy_(p @ value.to(p.dtype))


def _fake(query, key, value, mask=None, sinks=None, *, scale, diagonal=None, soft_cap=None):
    return heads_side_by_side(query, (*query.shape[:-1], value.shape[-1]))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, output)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad):
    saved = ctx.saved_tensors
    mask_needs = saved[3] is not None and ctx.needs_input_grad[3]
    return gradients(grad, *saved, mask_needs, **ctx.options)


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    mask_needs_grad: bool,
    *,
    scale: float,
    diagonal: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, mask and sinks, differentiable themselves.

    dV = PᵀdO;  dS = P∘(dO Vᵀ - Δ), Δ = rowsum(dO∘O);  dQ = scale dS K;  dK = scale dSᵀQ.

    A sink's value is 0, so that its dS is -p Δ, p being what it takes of the row. A cap c has the
    slope 1 - (z/c)² between the products' dS and that of the scores, which the mask is added to.
    """
    group = query.shape[1] // key.shape[1]
    scores = _unmasked(query, key, scale, soft_cap)
    p, taken = _probabilities(_masked(scores, mask, diagonal), sinks)
    wide_grad = grad.to(p.dtype)
    wide_key = key.repeat_interleave(group, dim=1).to(p.dtype)
    wide_value = value.repeat_interleave(group, dim=1).to(p.dtype)
    delta = (wide_grad * output.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (wide_grad @ wide_value.transpose(-1, -2) - delta)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    d_value = per_key_head(p.transpose(-1, -2) @ wide_grad).to(value.dtype)
    d_mask = d_sinks = None
    if mask_needs_grad:
        d_mask = ds.sum_to_size(mask.shape).to(mask.dtype)
    if soft_cap is not None:
        ds = ds * (1 - (scores / soft_cap) ** 2)
    d_query = (scale * ds @ wide_key).to(query.dtype)
    d_key = per_key_head(scale * ds.transpose(-1, -2) @ query.to(p.dtype)).to(key.dtype)
    if taken is not None:
        d_sinks = -(taken * delta).sum((0, 2, 3)).to(sinks.dtype)
    return d_query, d_key, d_value, d_mask, d_sinks


ATTENTION = Op(
    schema=(
        "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None,"
        " Tensor? sinks=None, *, float scale, SymInt? diagonal=None, float? soft_cap=None)"
        " -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
