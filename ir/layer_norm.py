"""LayerNorm over the last dimension, and LayerNorm of a residual sum, as operations.

Law, for a row s of N elements, with everything in fp32 (fp64 for fp64 inputs):

    m = sum_n s[n] / N,   v = sum_n (s[n] - m)² / N
    y = round((s - m) / sqrt(v + eps) * weight + bias)       (absent: weight 1, bias 0)

`layer_norm` takes s = x; `add_layer_norm` takes s = round(x + residual) and gives both y and s.
Source: Ba, Kiros and Hinton, Layer Normalization, equation 4.
"""

import torch
from torch import Tensor

from ridgeline.ir.op import Op


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """The law above in plain torch: x [..., N] of any strides, weight and bias [N] -> [..., N],
    x.dtype."""
    unit, _ = _unit(x, eps)
    y = unit if weight is None else unit * weight.to(unit.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype).contiguous()


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, s), s = x + residual in their dtype; residual has x's shape and dtype."""
    total = (x + residual).contiguous()
    return reference(total, weight, bias, eps=eps), total


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """u = (s - m) / sqrt(v + eps) and 1 / sqrt(v + eps), in the wide dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return centered * inverse, inverse


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """With g = dy weight:

    ds = (g - mean(g) - u mean(g u)) / sqrt(v + eps), in the wide dtype;
    dweight = sum over rows of dy u;  dbias = sum over rows of dy.
    """
    unit, inverse = _unit(x, eps)
    grad = grad.to(unit.dtype)
    d_weight = d_bias = None
    if bias is not None:
        d_bias = grad.flatten(0, -2).sum(0).to(bias.dtype)
    if weight is not None:
        d_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.to(unit.dtype)
    along = unit * (grad * unit).mean(-1, keepdim=True)
    return inverse * (grad - grad.mean(-1, keepdim=True) - along), d_weight, d_bias


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.eps = keyword_only_inputs["eps"]


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    d_x, d_weight, d_bias = _gradients(x, weight, bias, ctx.eps, grad)
    return d_x.to(x.dtype), d_weight, d_bias


def _add_setup_context(ctx, inputs, keyword_only_inputs, output):
    _, _, weight, bias = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.eps = keyword_only_inputs["eps"]


def _add_backward(ctx, grad, d_total):
    """The sum's own gradient passes through, to x and residual alike."""
    total, weight, bias = ctx.saved_tensors
    d_x, d_weight, d_bias = _gradients(total, weight, bias, ctx.eps, grad)
    d_x = (d_x + d_total.to(d_x.dtype)).to(total.dtype)
    return d_x, d_x, d_weight, d_bias


LAYER_NORM = Op(
    schema="layer_norm(Tensor x, Tensor? weight, Tensor? bias, *, float eps) -> Tensor",
    reference=reference,
    fake=lambda x, weight, bias, *, eps: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
ADD_LAYER_NORM = Op(
    schema=(
        "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, *, float eps)"
        " -> (Tensor, Tensor)"
    ),
    reference=add_reference,
    fake=lambda x, residual, weight, bias, *, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    setup_context=_add_setup_context,
    backward=_add_backward,
)
