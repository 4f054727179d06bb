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
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.activations import activation
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import (
    cast_back,
    is_floating,
    operand,
    orders,
    stranger,
    through_casts,
)

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::gated_activation`, as nodes of the program."""

    gate: fx.Node
    up: fx.Node
    activation: str


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
    if activation(node, set()) is not None:
        # x σ(x) alone is an activation, not a gate times something
        return None
    near: Reject | None = None
    for first, second in orders(node):
        inside: set[fx.Node] = {node}
        found = activation(first, inside)
        if found is None or not isinstance(second, fx.Node):
            continue
        up = through_casts(second, inside)
        name, gate = found
        if shape_of(gate) != shape_of(up) or shape_of(up) != shape_of(node):
            continue  # a gate per head or per token (squeeze-and-excite) is another function
        out = cast_back(node, up, inside)
        problem = stranger(inside, (out,))
        if problem is None:
            nodes = tuple(sorted(inside))
            return Site({"gate": gate, "up": up}, {}, nodes, (out,), name)
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
    elements = math.prod(numbers(value.shape))
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
