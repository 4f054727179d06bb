"""Linear layers of one input -> one linear layer on their weights, one upon the other.

Law: `ridgeline.passes.side_by_side`. Equal in real arithmetic: the terms of every sum stay, a
library may order them otherwise for another width. One launch takes the place of several and fills
a wide machine better; the price is a second copy of the weights, as the model keeps its own.
Source: the packed projections of Megatron-LM and vLLM, which models have to be written for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import fx

from ridgeline.cost_model import Gemm, Work, work_of
from ridgeline.ir.aliases import writes
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.sizes import numbers
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.operands import put
from ridgeline.passes.side_by_side import constant_biases, constant_weight, search, split, stacked

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """weights: [N_i,K] as the layers read them; biases: [N_i] or None of each."""

    x: fx.Node
    weights: tuple[fx.Node, ...]
    biases: tuple[fx.Node | None, ...]


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Constants of one dtype, and no training: what is merged is a copy. Where that does not hold,
    each layer stays one, which is no miss that a user could act on."""
    call = Call(
        site.bind["x"],
        tuple(cast(fx.Node, out.args[1]) for out in site.outs),
        tuple(cast(fx.Node | None, (*out.args, None)[2]) for out in site.outs),
    )
    sources = [constant_weight(weight)[0] for weight in call.weights]
    constants = [source for source in sources if source is not None and not writes(source)]
    values = [weight.meta["val"] for weight in call.weights]
    mergeable = len({value.dtype for value in values}) == 1 and {v.dim() for v in values} == {2}
    whole = len(constants) == len(values) and constant_biases(call.biases)
    if setting.training or not mergeable or not whole:
        return []
    return [
        Candidate(
            rewrite=MERGED_LINEAR,
            site=site,
            call=call,
            before=sum((work_of(n) for n in site.nodes), Work()),
            after=Work((_product(call),)),
            variant=f"{len(values)} layers of one input",
            memory_bytes=sum(v.nbytes for v in values),
            preconditions=(
                f"constants of the model: {', '.join(str(c.target) for c in constants)}",
            ),
        )
    ]


def _product(call: Call) -> Gemm:
    x = call.x.meta["val"]
    rows = prod(numbers(x.shape[:-1]))
    width = sum(weight.meta["val"].shape[0] for weight in call.weights)
    return Gemm(rows, width, x.shape[-1], dtype=x.dtype, bias=any(call.biases))


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `linear` on the stacked constants, and its slices in the layers' places."""
    call: Call = candidate.call
    outs = [copied[out] for out in candidate.site.outs]
    sizes = [w.meta["val"].shape[0] for w in call.weights]
    biases = [None if b is None else copied[b] for b in call.biases]
    first = min(outs)
    with module.graph.inserting_before(first):
        weights = [_here(copied[w]) for w in call.weights]
        operands = (stacked(weights, sizes), stacked(biases, sizes))
        new = module.graph.call_function(
            aten.linear.default, (copied[call.x], *(o for o in operands if o is not None))
        )
    value = first.meta["val"]
    new.meta = {**first.meta, "val": value.new_empty((*value.shape[:-1], sum(sizes)))}
    split(new, outs, sizes)
    return new


def _here(weight: fx.Node) -> fx.Node:
    """A weight at the graph's current point, before which a transpose may not stand yet."""
    if weight.target is not aten.t.default:
        return weight
    return put(weight.graph, aten.t.default, weight.args[0])


MERGED_LINEAR = Pass(
    name="merged_linear",
    op=None,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
)
