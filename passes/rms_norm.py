"""RMSNorm in any of its spellings -> `ridgeline::rms_norm`, or `add_rms_norm` after an addition.

Law: see `ridgeline.ir.rms_norm`. The rewrite is equal in real arithmetic: everything is fp32, and
the roundings that a model makes between square and weight are left out. The root may be a rsqrt,
a division by a square root or by its reciprocal; the weight may be absent, or stored less a
constant.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.passes import norm_site
from ridgeline.passes.base import Candidate, Pass, Setting

aten = torch.ops.aten


def _rsqrt(x: Tensor, v: Tensor) -> Tensor:
    return x * torch.rsqrt(v)


def _reciprocal(x: Tensor, v: Tensor) -> Tensor:
    return x * torch.reciprocal(torch.sqrt(v))


def _division(x: Tensor, v: Tensor) -> Tensor:
    return x / torch.sqrt(v)


ROOTS = (
    (_rsqrt, aten.rsqrt.default),
    (_reciprocal, aten.sqrt.default),
    (_division, aten.sqrt.default),
)


def _spelled(root: Callable[[Tensor, Tensor], Tensor], anchor: Any) -> tuple[Pattern, ...]:
    def unit(x: Tensor, again: Tensor, eps: float) -> Tensor:
        return root(again, x.pow(2).mean(-1, keepdim=True) + eps)

    def rms_norm_shifted(
        x: Tensor, again: Tensor, weight: Tensor, eps: float, shift: float
    ) -> Tensor:
        return unit(x, again, eps) * (weight + shift)

    def rms_norm(x: Tensor, again: Tensor, weight: Tensor, eps: float) -> Tensor:
        return unit(x, again, eps) * weight

    x, weight = torch.empty(2, 3, 8), torch.empty(8)
    given: dict[str, Any] = {"x": x, "again": x}
    return (
        trace(rms_norm_shifted, anchor, **given, weight=weight, eps=0.37, shift=0.41),
        trace(rms_norm, anchor, **given, weight=weight, eps=0.37),
        trace(unit, anchor, **given, eps=0.37),
    )


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The spellings left after normalisation, the most specific first."""
    x, weight = torch.empty(2, 3, 8), torch.empty(8)
    call = aten.rms_norm.default
    return (
        *(pattern for spelling in ROOTS for pattern in _spelled(*spelling)),
        norm_site.sized(trace(fused_weighted, call, x=x, weight=weight, eps=0.37)),
        norm_site.sized(trace(fused_plain, call, x=x, eps=0.37)),
        norm_site.sized(trace(fused_by_default, call, x=x, weight=weight)),
    )


def fused_weighted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (8,), weight, eps)


def fused_plain(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (8,), None, eps)


def fused_by_default(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), weight)


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes, shapes and layout; state the work on both sides."""
    if "eps" not in site.literals:
        return Reject(
            f"{site.outs[0].name} takes the eps that torch chooses for its dtype",
            site.outs[0],
            "name eps",
        )
    if norm_site.centered(site.bind["x"]):
        return []  # the heart of a LayerNorm
    if norm_site.part_of_larger(site, FAMILY) or norm_site.smaller_suffices(site):
        return []
    return norm_site.candidates(FAMILY, site, setting)


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::rms_norm` or `add_rms_norm` where its results are first needed."""
    return norm_site.apply(FAMILY, candidate, copied, module)


RMS_NORM_PASS = Pass(
    name="rms_norm",
    op=RMS_NORM,
    exactness="reassociating",
    patterns=patterns,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 5e-7, "bfloat16": 4e-3, "float16": 6e-4},
)
FAMILY = norm_site.Family(lambda: RMS_NORM_PASS, RMS_NORM, ADD_RMS_NORM, center=False)
