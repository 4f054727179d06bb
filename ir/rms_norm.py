"""RMSNorm over the last dimension, and RMSNorm of a residual sum, as operations.

Law, for a row s of N elements, with everything in fp32 (fp64 for fp64 inputs):

    v = sum_n s[n]² / N
    y = round(s / sqrt(v + eps) * (shift + weight))          (no weight: the factor is 1)

`rms_norm` takes s = x; `add_rms_norm` takes s = round(x + residual), as a model's residual stream
does, and gives both y and s. shift is 0, or 1 where a model stores its weight less one (Gemma).
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, equation 4.
"""

import torch
from torch import Tensor

from ridgeline.ir.op import Op


def reference(x: Tensor, weight: Tensor | None = None, *, eps: float, shift: float = 0.0) -> Tensor:
    """The law above in plain torch: x [..., N] of any strides, weight [N] -> [..., N], x.dtype."""
    return _normed(x, weight, eps, shift)[0]


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, s), s = x + residual in their dtype; residual has x's shape and dtype."""
    total = (x + residual).contiguous()
    return reference(total, weight, eps=eps, shift=shift), total


def _normed(
    x: Tensor, weight: Tensor | None, eps: float, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y in x's dtype, s / sqrt(v + eps) and 1 / sqrt(v + eps) in the wide one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * inverse
    y = unit if weight is None else unit * (weight.to(wide.dtype) + shift)
    return y.to(x.dtype).contiguous(), unit, inverse


def _gradients(
    x: Tensor, weight: Tensor | None, eps: float, shift: float, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """With u = s / sqrt(v + eps), g = dy (shift + weight):

    ds = (g - u mean(g u)) / sqrt(v + eps), in the wide dtype;   dweight = sum over rows of dy u.
    """
    _, unit, inverse = _normed(x, None, eps, shift)
    grad = grad.to(unit.dtype)
    d_weight = None
    if weight is not None:
        d_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * (weight.to(unit.dtype) + shift)
    return inverse * (grad - unit * (grad * unit).mean(-1, keepdim=True)), d_weight


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, weight = inputs
    ctx.save_for_backward(x, weight)
    ctx.eps, ctx.shift = keyword_only_inputs["eps"], keyword_only_inputs["shift"]


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    d_x, d_weight = _gradients(x, weight, ctx.eps, ctx.shift, grad)
    return d_x.to(x.dtype), d_weight


def _add_setup_context(ctx, inputs, keyword_only_inputs, output):
    _, _, weight = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.eps, ctx.shift = keyword_only_inputs["eps"], keyword_only_inputs["shift"]


def _add_backward(ctx, grad, d_total):
    """The sum's own gradient passes through, to x and residual alike."""
    total, weight = ctx.saved_tensors
    d_x, d_weight = _gradients(total, weight, ctx.eps, ctx.shift, grad)
    d_x = (d_x + d_total.to(d_x.dtype)).to(total.dtype)
    return d_x, d_x, d_weight


RMS_NORM = Op(
    schema="rms_norm(Tensor x, Tensor? weight=None, *, float eps, float shift=0.0) -> Tensor",
    reference=reference,
    fake=lambda x, weight=None, *, eps, shift=0.0: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
ADD_RMS_NORM = Op(
    schema=(
        "add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, *, float eps,"
        " float shift=0.0) -> (Tensor, Tensor)"
    ),
    reference=add_reference,
    fake=lambda x, residual, weight=None, *, eps, shift=0.0: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
    ),
    setup_context=_add_setup_context,
    backward=_add_backward,
)
