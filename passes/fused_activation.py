"""A refitted activation in one kernel with the layer beside it.

What `ridgeline.passes.rational_activation` puts in an activation's place is a rational function
like any other, so that the layer before or after it, or the LayerNorm before it, may take it into
its kernel. The activation alone and each such pair are candidates side by side, of which the
chooser picks once: a second look at the rewritten graph would come after the layer had been
given to another pass. A pair's error is the activation's own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ridgeline.codegen.kernel import buffer, hints
from ridgeline.cost_model import Norm, Stream, Work
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.rational_fit import Fit
from ridgeline.passes import linear_rational, norm_rational
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.rational_sites import Call as Rational
from ridgeline.passes.rational_sites import Found


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """reads: the nodes that the kernel takes. fitted: the rational function. pair: the candidate of
    the pass that has the kernel, with `numerator` and `denominator` for coefficients, which become
    buffers when it is applied."""

    reads: tuple[fx.Node, ...]
    fitted: Fit
    pair: Candidate
    numerator: fx.Node
    denominator: fx.Node


def coefficients(fitted: Fit, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """a [1, m+1] and b [1, n]."""
    numerator, denominator = fitted.numerator, fitted.denominator
    return torch.tensor([numerator], dtype=dtype), torch.tensor([denominator], dtype=dtype)


def held(module: fx.GraphModule, fitted: Fit, out: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The coefficients as buffers on the device of x, named after the node `out`."""
    device = x.meta["val"].device
    numerator, denominator = (c.to(device) for c in coefficients(fitted, torch.float32))
    return (
        buffer(module, f"{out.name}_numerator", numerator, x),
        buffer(module, f"{out.name}_denominator", denominator, x),
    )


def pairs(alone: Candidate, fitted: Fit, setting: Setting) -> tuple[list[Candidate], list[Reject]]:
    """The activation of `alone` with each layer beside it, and why other layers are none."""
    x, out = alone.site.bind["x"], alone.site.outs[0]
    a, b = _placeholders(fitted, x)
    found = Found(Rational(x, a, b, "abs_terms", 1, False), alone.site.nodes, out)
    candidates: list[Candidate] = []
    refused: list[Reject] = []
    for beside, fused in _PASSES:
        sites, between = beside(found, out)
        refused += between
        for site in sites:
            answer = fused(site, found, setting)
            if isinstance(answer, Reject):
                refused.append(answer)
            else:
                candidates += [_pair(c, alone, Fused(_reads(c, (a, b)), fitted, c, a, b))
                               for c in answer]  # fmt: skip
    return candidates, refused


_Beside = Callable[[Found, fx.Node], tuple[list[Site], list[Reject]]]
_Fuse = Callable[[Site, Found, Setting], list[Candidate] | Reject]
_PASSES: tuple[tuple[_Beside, _Fuse], ...] = (
    (linear_rational.beside, linear_rational.fused),
    (norm_rational.beside, norm_rational.fused),
)


def _placeholders(fitted: Fit, x: fx.Node) -> list[fx.Node]:
    """Nodes of no program that stand for the coefficients until they are its buffers."""
    graph, like = fx.Graph(), x.meta["val"]
    nodes = []
    for name, values in zip(("a", "b"), coefficients(fitted, torch.float32), strict=True):
        node = graph.placeholder(name)
        node.meta["val"] = like.new_empty(values.shape, dtype=torch.float32)
        nodes.append(node)
    return nodes


def _reads(pair: Candidate, made: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    values = (getattr(pair.call, f.name) for f in dataclasses.fields(pair.call))
    return tuple(v for v in values if isinstance(v, fx.Node) and v not in made)


def _pair(pair: Candidate, alone: Candidate, call: Fused) -> Candidate:
    """The pair as a candidate of the pass that refits."""
    layer = pair.site.bind.get("layer") or pair.site.bind["norm"]
    return dataclasses.replace(
        alone,
        site=pair.site,
        call=call,
        before=_before(pair, alone),
        after=pair.after,
        variant=f"{alone.variant}, in one kernel with {said(layer)}",
        preconditions=(*alone.preconditions, *pair.preconditions),
    )


def _before(pair: Candidate, alone: Candidate) -> Work:
    """The layer, and the activation's loop: apart from a product, within that of a norm."""
    first = pair.before.kernels[0]
    if not isinstance(first, Norm):
        return Work((first,)) + alone.before
    loop = alone.before.kernels[0]
    assert isinstance(loop, Stream)
    terms = math.ceil(loop.flops / (2 * math.prod(hints(alone.site.bind["x"]))))
    return Work((dataclasses.replace(first, terms=terms), *pair.before.kernels[1:]))


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put the pair's operation where it is computed, its coefficients before it."""
    call: Fused = candidate.call
    out = copied[candidate.site.outs[0]]
    with module.graph.inserting_before(out):
        a, b = held(module, call.fitted, out, copied[call.reads[0]])
    known = {**copied, call.numerator: a, call.denominator: b}
    return call.pair.rewrite.apply(call.pair, known, module)
