"""LayerNorm, fused or spelled out -> `ridgeline::layer_norm`, or `add_layer_norm` after a sum.

Law: see `ridgeline.ir.layer_norm`. The rewrite is equal in real arithmetic: everything is fp32 and
rounded once. Spelled out, the variance may be the mean of the centred values' squares, or torch's
biased `var`, and the root a rsqrt or a division by a square root.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.passes import norm_site
from ridgeline.passes.base import Candidate, Pass, Setting

aten = torch.ops.aten


def fused(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), weight, bias, eps)


def fused_without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), weight, None, eps)


def fused_plain(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), None, None, eps)


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


def _rsqrt(x: Tensor, v: Tensor) -> Tensor:
    return x * torch.rsqrt(v)


def _division(x: Tensor, v: Tensor) -> Tensor:
    return x / torch.sqrt(v)


MOMENTS = (_centered_once, _centered_twice, _var, _var_corrected)
ROOTS = ((_rsqrt, aten.rsqrt.default), (_division, aten.sqrt.default))


def _spelled(
    moments: Callable[[Tensor], tuple[Tensor, Tensor]],
    root: Callable[[Tensor, Tensor], Tensor],
    anchor: Any,
) -> tuple[Pattern, ...]:
    def unit(x: Tensor, eps: float) -> Tensor:
        centered, variance = moments(x)
        return root(centered, variance + eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return unit(x, eps) * weight + bias

    def layer_norm_without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return unit(x, eps) * weight

    x, weight, bias = torch.empty(2, 3, 8), torch.empty(8), torch.empty(8)
    return (
        trace(layer_norm, anchor, x=x, weight=weight, bias=bias, eps=0.37),
        trace(layer_norm_without_bias, anchor, x=x, weight=weight, eps=0.37),
        trace(unit, anchor, x=x, eps=0.37),
    )


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The spellings left after normalisation, the most specific first."""
    x, weight, bias = torch.empty(2, 3, 8), torch.empty(8), torch.empty(8)
    call = aten.layer_norm.default
    return (
        norm_site.sized(trace(fused, call, x=x, weight=weight, bias=bias, eps=0.37)),
        norm_site.sized(trace(fused_without_bias, call, x=x, weight=weight, eps=0.37)),
        norm_site.sized(trace(fused_plain, call, x=x, eps=0.37)),
        *(p for moments in MOMENTS for root in ROOTS for p in _spelled(moments, *root)),
    )


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes, shapes and layout; state the work on both sides."""
    if norm_site.part_of_larger(site, FAMILY) or norm_site.smaller_suffices(site):
        return []
    return norm_site.candidates(FAMILY, site, setting)


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::layer_norm` or `add_layer_norm` where its results are first needed."""
    return norm_site.apply(FAMILY, candidate, copied, module)


LAYER_NORM_PASS = Pass(
    name="layer_norm",
    op=LAYER_NORM,
    exactness="reassociating",
    patterns=patterns,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 5e-7, "bfloat16": 4e-3, "float16": 6e-4},
)
FAMILY = norm_site.Family(lambda: LAYER_NORM_PASS, LAYER_NORM, ADD_LAYER_NORM, center=True)
