"""The spellings of RMSNorm and LayerNorm that are left after normalisation, as patterns.

The root may be a rsqrt, a division by a square root or a product with its reciprocal. RMSNorm's
weight may be absent, or stored less a constant (Gemma); what is scaled is bound apart from what is
squared, because T5 casts only the latter. LayerNorm's variance may be the mean of the centred
values' squares, which a model may compute twice, or torch's biased `var`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.match import Pattern, trace

aten = torch.ops.aten
Root = Callable[[Tensor, Tensor], Tensor]
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
EPS, SHIFT, SIZE = 0.37, 0.41, 0.61
"""Numbers that stand for any literal."""


def patterns() -> tuple[Pattern, ...]:
    """Every spelling, the most specific first; the literals are eps and perhaps shift or size."""
    return (
        *_fused(),
        *(p for moments in MOMENTS for root in ROOTS for p in _layer_norm(moments, *root)),
        *(p for root in ROOTS for p in _rms_norm(*root)),
    )


def _fused() -> tuple[Pattern, ...]:
    x, weight, bias = torch.empty(2, 3, 8), torch.empty(8), torch.empty(8)
    layer, rms = aten.layer_norm.default, aten.rms_norm.default
    traced = (
        trace(fused_layer_norm, layer, x=x, weight=weight, bias=bias, eps=EPS),
        trace(fused_layer_norm_without_bias, layer, x=x, weight=weight, eps=EPS),
        trace(fused_layer_norm_plain, layer, x=x, eps=EPS),
        trace(fused_rms_norm, rms, x=x, weight=weight, eps=EPS),
        trace(fused_rms_norm_plain, rms, x=x, eps=EPS),
        trace(fused_rms_norm_by_default, rms, x=x.bfloat16(), weight=weight.bfloat16()),
    )
    return tuple(map(_sized, traced))


def _sized(pattern: Pattern) -> Pattern:
    """`normalized_shape` is one number, the literal `size`."""
    pattern.outs[0].update_arg(1, [SIZE])
    return replace(pattern, literals={**pattern.literals, SIZE: "size"})


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), weight, bias, eps)


def fused_layer_norm_without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), weight, None, eps)


def fused_layer_norm_plain(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), None, None, eps)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (8,), weight, eps)


def fused_rms_norm_plain(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (8,), None, eps)


def fused_rms_norm_by_default(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), weight)


def _rsqrt(x: Tensor, v: Tensor) -> Tensor:
    return x * torch.rsqrt(v)


def _division(x: Tensor, v: Tensor) -> Tensor:
    return x / torch.sqrt(v)


def _reciprocal(x: Tensor, v: Tensor) -> Tensor:
    return x * torch.reciprocal(torch.sqrt(v))


def _centered_once(x: Tensor) -> tuple[Tensor, Tensor]:
    centered = x - x.mean(-1, keepdim=True)
    return centered, centered.pow(2).mean(-1, keepdim=True)


def _centered_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    return x - mean, (x - mean).pow(2).mean(-1, keepdim=True)


def _var(x: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)


def _var_corrected(x: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)


ROOTS: tuple[tuple[Root, Any], ...] = (
    (_rsqrt, aten.rsqrt.default),
    (_division, aten.sqrt.default),
    (_reciprocal, aten.sqrt.default),
)
MOMENTS: tuple[Moments, ...] = (_centered_once, _centered_twice, _var, _var_corrected)


def _layer_norm(moments: Moments, root: Root, anchor: Any) -> tuple[Pattern, ...]:
    def layer_norm_plain(x: Tensor, eps: float) -> Tensor:
        centered, variance = moments(x)
        return root(centered, variance + eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return layer_norm_plain(x, eps) * weight + bias

    def layer_norm_without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return layer_norm_plain(x, eps) * weight

    x, weight, bias = torch.empty(2, 3, 8), torch.empty(8), torch.empty(8)
    return (
        trace(layer_norm, anchor, x=x, weight=weight, bias=bias, eps=EPS),
        trace(layer_norm_without_bias, anchor, x=x, weight=weight, eps=EPS),
        trace(layer_norm_plain, anchor, x=x, eps=EPS),
    )


def _rms_norm(root: Root, anchor: Any) -> tuple[Pattern, ...]:
    def rms_norm_plain(x: Tensor, again: Tensor, eps: float) -> Tensor:
        return root(again, x.pow(2).mean(-1, keepdim=True) + eps)

    def rms_norm_shifted(
        x: Tensor, again: Tensor, weight: Tensor, eps: float, shift: float
    ) -> Tensor:
        return rms_norm_plain(x, again, eps) * (weight + shift)

    def rms_norm(x: Tensor, again: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_plain(x, again, eps) * weight

    x, weight = torch.empty(2, 3, 8), torch.empty(8)
    given: dict[str, Any] = {"x": x, "again": x}
    return (
        trace(rms_norm_shifted, anchor, **given, weight=weight, eps=EPS, shift=SHIFT),
        trace(rms_norm, anchor, **given, weight=weight, eps=EPS),
        trace(rms_norm_plain, anchor, **given, eps=EPS),
    )
