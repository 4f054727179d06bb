"""act(gate) * up in any of its spellings -> `ridgeline::gated_activation` (SwiGLU, GEGLU, ReGLU).

Law: see `ridgeline.ir.gated`. Equal in real arithmetic; one rounding where a chain of 16-bit
operations has several. A site is a product of two tensors of one shape, one of which is an
activation, whose value nothing else reads. A gate and an up that are slices of one packed tensor
are read where they lie. Source: Shazeer, GLU Variants Improve Transformer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ridgeline.cost_model import Work
from ridgeline.cost_model.pointwise import gated_work
from ridgeline.ir.gated import GATED_ACTIVATION, TANH_CUBIC, TANH_SCALE
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import (
    is_floating,
    operand,
    orders,
    stranger,
    through_casts,
)

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CLOSE = 1e-6
_PLAIN = {
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::gated_activation`, as nodes of the program."""

    gate: fx.Node
    up: fx.Node
    activation: str


Found = tuple[str, fx.Node]


def _is(value: object, number: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=_CLOSE)


def _activation(node: object, seen: set[fx.Node]) -> Found | None:
    """(activation, x) where the node computes act(x); the nodes on the way are added to `seen`."""
    node = through_casts(node, seen)
    if not isinstance(node, fx.Node):
        return None
    inside = {node}
    found = None
    if node.target in _PLAIN:
        found = _PLAIN[node.target], through_casts(node.args[0], inside)
    elif node.target is aten.gelu.default:
        form = node.kwargs.get("approximate", "none")
        found = "gelu" if form == "none" else "gelu_tanh", through_casts(node.args[0], inside)
    elif node.target is aten.mul.Tensor:
        found = _written_out(node, inside)
    elif node.target is aten.div.Tensor:
        found = _logistic(node, inside)
    if found is not None:
        seen |= inside
    return found


def _written_out(node: fx.Node, seen: set[fx.Node]) -> Found | None:
    """x σ(x), x (1 + erf(x / √2)) / 2 and its tanh form, the factors in any order."""
    inside: set[fx.Node] = set()
    factors = list(_factors(node, inside))
    tensors = [f for f in factors if isinstance(f, fx.Node)]
    scale = math.prod(f for f in factors if not isinstance(f, fx.Node))
    if len(tensors) != 2:
        return None
    for x, other in (tensors, tensors[::-1]):
        if other.target is aten.sigmoid.default and _is(scale, 1.0):
            inner: set[fx.Node] = {other}
            if through_casts(other.args[0], inner) is x:
                seen |= inside | inner
                return "silu", x
        inner = {other}
        name = _cdf(other, x, inner)
        if name is not None and _is(scale, 0.5):
            seen |= inside | inner
            return name, x
    return None


def _factors(value: object, seen: set[fx.Node]) -> list[object]:
    """What a chain of products multiplies; numbers and tensors of one shape."""
    value = through_casts(value, seen)
    if isinstance(value, fx.Node):
        if value.target is aten.mul.Tensor and (len(value.users) == 1 or not seen):
            seen.add(value)
            return [f for a in value.args for f in _factors(a, seen)]
        if value.target is aten.div.Tensor and isinstance(value.args[1], int | float):
            seen.add(value)
            return [*_factors(value.args[0], seen), 1.0 / value.args[1]]
    return [value]


def _plain_sum(node: fx.Node) -> bool:
    """A sum without alpha."""
    return node.target is aten.add.Tensor and not node.kwargs


def _cdf(node: fx.Node, x: fx.Node, seen: set[fx.Node]) -> str | None:
    """1 + erf(x / √2): "gelu"; 1 + tanh(√(2/π) (x + 0.044715 x³)): "gelu_tanh"."""
    if not _plain_sum(node):
        return None
    for one, term in orders(node):
        term = through_casts(term, seen)
        if not _is(one, 1.0) or not isinstance(term, fx.Node):
            continue
        seen.add(term)
        if term.target is aten.erf.default:
            factors = _inner_factors(term.args[0], seen)
            if _times(factors, x) is not None and _is(_times(factors, x), math.sqrt(0.5)):
                return "gelu"
        if term.target is aten.tanh.default and _is_tanh_argument(term.args[0], x, seen):
            return "gelu_tanh"
    return None


def _inner_factors(value: object, seen: set[fx.Node]) -> list[object]:
    inside: set[fx.Node] = set()
    factors = _factors(value, inside)
    seen |= inside
    return factors


def _times(factors: list[object], x: fx.Node, power: int = 1) -> float | None:
    """c where the factors multiply to c x^power."""
    scale, degree = 1.0, 0
    for factor in factors:
        if isinstance(factor, int | float):
            scale *= factor
        elif factor is x:
            degree += 1
        elif isinstance(factor, fx.Node) and factor.target is aten.pow.Tensor_Scalar:
            if factor.args[0] is not x:
                return None
            degree += factor.args[1]
        else:
            return None
    return scale if degree == power else None


def _is_tanh_argument(value: object, x: fx.Node, seen: set[fx.Node]) -> bool:
    """√(2/π) (x + 0.044715 x³), or √(2/π) x (1 + 0.044715 x²)."""
    factors = _inner_factors(value, seen)
    sums = [f for f in factors if isinstance(f, fx.Node) and _plain_sum(f)]
    if len(sums) != 1:
        return False
    rest = [f for f in factors if f is not sums[0]]
    seen.add(sums[0])
    for a, b in orders(sums[0]):
        outside: set[fx.Node] = set()
        cubic = _factors(b, outside)
        powers = {n for n in cubic if isinstance(n, fx.Node) and n is not x}
        if a is x and _is(_times(rest, x, 0), TANH_SCALE) and _is(_times(cubic, x, 3), TANH_CUBIC):
            seen |= outside | powers
            return True
        scaled = _is(_times(rest, x, 1), TANH_SCALE) and _is(_times(cubic, x, 2), TANH_CUBIC)
        if _is(a, 1.0) and scaled:
            seen |= outside | powers
            return True
    return False


def _logistic(node: fx.Node, seen: set[fx.Node]) -> Found | None:
    """x / (1 + exp(-x))."""
    x, below = node.args[0], through_casts(node.args[1], seen)
    if not isinstance(x, fx.Node) or not isinstance(below, fx.Node):
        return None
    x = through_casts(x, seen)
    if not _plain_sum(below):
        return None
    seen.add(below)
    for one, term in orders(below):
        if not _is(one, 1.0) or not isinstance(term, fx.Node):
            continue
        if term.target is aten.exp.default:
            negated = term.args[0]
            seen |= {term, negated}
            if negated.target is aten.neg.default and through_casts(negated.args[0], seen) is x:
                return "silu", x
    return None


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Every product with an activation that fits, and why others nearly did."""
    sites: list[Site] = []
    misses: list[Reject] = []
    taken: set[fx.Node] = set()
    # From the end: x σ(x) * up is one site, of which x σ(x) is a part.
    for node in reversed(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        if node in taken or not is_floating(node):
            continue
        answer = _site(node)
        if isinstance(answer, Site):
            sites.append(answer)
            taken |= set(answer.nodes)
        elif answer is not None:
            misses.append(answer)
    return sites[::-1], [m for m in misses[::-1] if m.node not in taken]


def _site(node: fx.Node) -> Site | Reject | None:
    if _activation(node, set()) is not None:
        # x σ(x) alone is an activation, not a gate times something
        return None
    near: Reject | None = None
    for first, second in orders(node):
        inside: set[fx.Node] = {node}
        found = _activation(first, inside)
        if found is None or not isinstance(second, fx.Node):
            continue
        up = through_casts(second, inside)
        name, gate = found
        if shape_of(gate) != shape_of(up) or shape_of(up) != shape_of(node):
            continue  # a gate per head or per token (squeeze-and-excite) is another function
        problem = stranger(inside, (node,))
        if problem is None:
            nodes = tuple(sorted(inside))
            return Site({"gate": gate, "up": up}, {}, nodes, (node,), name)
        near = near or problem
    return near


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes; state the work on both sides."""
    gate, up, out = site.bind["gate"], site.bind["up"], site.outs[0]
    dtypes = {n.meta["val"].dtype for n in (gate, up, out)}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        names = sorted(str(d).removeprefix("torch.") for d in dtypes)
        return Reject(
            f"gate, up and product have dtypes {names}; one of float32, bfloat16, float16 is"
            " needed",
            out,
            "compute gate, up and their product in one dtype",
        )
    return [
        Candidate(
            rewrite=GATED,
            site=site,
            call=Call(gate, up, site.pattern),
            before=_work(site, setting, ours=False),
            after=_work(site, setting, ours=True),
            preconditions=(
                f"{site.pattern} of {said(gate)} times {said(up)}, of one shape",
                "the activation is read by this product alone",
            ),
        )
    ]


def _work(site: Site, setting: Setting, *, ours: bool) -> Work:
    value = site.outs[0].meta["val"]
    elements = math.prod(s if isinstance(s, int) else int(s.node.hint) for s in value.shape)
    return gated_work(elements, value.dtype, site.pattern, kind=setting.target.kind, ours=ours)


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::gated_activation` where the product is computed."""
    call: Call = candidate.call
    out = copied[candidate.site.outs[0]]
    gate, up = (operand(candidate, copied, n) for n in (call.gate, call.up))
    with module.graph.inserting_before(out):
        new = module.graph.call_function(
            GATED_ACTIVATION.overload, (gate, up), {"activation": call.activation}
        )
    shape = out.meta["val"].shape
    new.meta = {**out.meta, "val": gate.meta["val"].new_empty(shape)}
    out.replace_all_uses_with(new)
    return new


GATED = Pass(
    name="gated_activation",
    op=GATED_ACTIVATION,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
