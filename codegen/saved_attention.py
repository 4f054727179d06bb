"""Attention for training: a forward that keeps rows' softmax statistics, a backward on them.

Law: `ridgeline.ir.attention`. Nothing of size Sq x Sk is kept: a backend's backward recomputes the
probabilities tile by tile, from the maximum m and the total l of each row's softmax, which are kept
as stats = (m, log l), fp32 [2,B,H,Sq]; (0, inf) for a row without keys. FlashAttention keeps their
sum, which loses log l where a mask of finfo.min made m. A sink, which has no value, gets

    dsinks[h] = - sum over rows of exp(sinks[h] - m - log l) delta,   delta = do·o

The gradient of a mask is as large as the scores themselves: where one is asked for, or a second
derivative, the whole backward is that of `ridgeline::attention`, in plain torch.
Source: Dao, FlashAttention-2, section 3.1.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir import attention as law
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.op import LIBRARY


def register(
    backend: str,
    key: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    unit: Callable[[Tensor | None], float] = lambda mask: 1.0,
) -> torch._ops.OpOverload:
    """Defines `ridgeline::{backend}_attention_saved`, implemented for torch's dispatch key `key`.

    forward(query, key, value, mask, sinks, *, scale, diagonal, soft_cap) -> (out [B,H,Sq,Dv],
    stats); backward(grad, query, key, value, mask, out, stats, *, ...) -> (dq, dk, dv, delta fp32
    [B,H,Sq]); unit: that of the statistics, given the mask. Returns the operation.
    """
    saved, back = f"{backend}_attention_saved", f"{backend}_attention_backward"
    options = "float scale, SymInt? diagonal=None, float? soft_cap=None"
    LIBRARY.define(
        f"{saved}(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? sinks=None, *,"
        f" {options}) -> (Tensor, Tensor)"
    )
    LIBRARY.define(
        f"{back}(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out,"
        f" Tensor stats, *, {options}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.impl(saved, forward, key)
    LIBRARY.impl(back, backward, key)
    torch.library.register_fake(f"ridgeline::{saved}", fake_saved)
    torch.library.register_fake(f"ridgeline::{back}", _fake_backward)
    overload = getattr(torch.ops.ridgeline, back).default

    def gradients(ctx, grad, _):
        query, key, value, mask, sinks, out, stats = ctx.saved_tensors
        mask_needs = mask is not None and ctx.needs_input_grad[3]
        if mask_needs or torch.is_grad_enabled():
            operands = query, key, value, mask, sinks, out
            return law.gradients(grad, *operands, mask_needs, **ctx.options)
        *found, delta = overload(grad, query, key, value, mask, out, stats, **ctx.options)
        d_sinks = None
        if sinks is not None:
            peak, log_total = unit(mask) * stats
            taken = torch.exp(sinks.float()[:, None] - peak - log_total)
            d_sinks = -(taken * delta).sum((0, 2)).to(sinks.dtype)
        return *found, None, d_sinks

    torch.library.register_autograd(f"ridgeline::{saved}", gradients, setup_context=_setup_context)
    return getattr(torch.ops.ridgeline, saved).default


def place(node: fx.Node, module: fx.GraphModule, saved: torch._ops.OpOverload) -> None:
    """Put `saved` and its first output where a node of `ridgeline::attention` stands."""
    node.target = saved
    with module.graph.inserting_after(node):
        first = module.graph.call_function(operator.getitem, (node, 0))
    node.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    first.meta = dict(node.meta)


def row_dots(grad: Tensor, out: Tensor) -> Tensor:
    """delta = do·o, fp32 [B,H,Sq] contiguous."""
    return (grad.float() * out.float()).sum(-1).contiguous()


def fake_saved(query, key, value, mask=None, sinks=None, **options: Any) -> tuple[Tensor, Tensor]:
    """(out [B,H,Sq,Dv], in memory [B,Sq,H,Dv], stats), not written yet."""
    out = heads_side_by_side(query, (*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(2, *query.shape[:3], dtype=torch.float32)


def _fake_backward(grad, query, key, value, mask, out, stats, **options: Any):
    made = (x.new_empty(x.shape) for x in (query, key, value))
    return *made, stats.new_empty(stats.shape[1:])


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])
