"""A group-wise rational function in plain ATen -> `ridgeline::group_rational`.

Law: see `ridgeline.ir.group_rational`. Anchored at the division and read as
`ridgeline.passes.rational_sites` says; the sign of 0 is autograd's, so that gradients stay those of
the graph. Equal in real arithmetic.
Source: the public KAT_Group and FlashKAT_Group classes.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, fx

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels, for training too
from ridgeline.cost_model import Work, work_of
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.rational_sites import Call, rational_at, set_in_place

aten = torch.ops.aten
_NEVER = 1 << 30
"""Divisions are common: that one is no quotient of tensors is not worth a line of the account."""


def quotient(top: Tensor, bottom: Tensor) -> Tensor:
    return top / bottom


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The anchor; `accepts` reads what stands above it."""
    traced = trace(quotient, aten.div.Tensor, top=torch.empty(2, 3), bottom=torch.empty(2, 3))
    return (dataclasses.replace(traced, near=_NEVER),)


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Read the quotient; state the work on both sides."""
    found = rational_at(site.outs[0])
    if found is None:  # an ordinary division
        return []
    if isinstance(found, Reject):
        return found
    call, nodes, out = found.call, found.nodes, found.out
    bind = {"x": call.x, "numerator": call.numerator, "denominator": call.denominator}
    m, n = (int(n.meta["val"].shape[1]) for n in (call.numerator, call.denominator))
    return [
        Candidate(
            rewrite=GROUP_RATIONAL_PASS,
            site=dataclasses.replace(site, bind=bind, nodes=nodes, outs=(out,)),
            call=call,
            # A compiled backward of ten operations and more takes several times ours (`ridgeline
            # bench group-rational`); how many loops it is, is not modelled.
            before=sum((work_of(n) for n in nodes), Work()) if setting.training else found.work,
            after=found.work_of_one_call,
            preconditions=(
                f"the denominator has form {call.form}",
                f"degrees {m - 1} and {n}, the columns of one matrix each",
                f"{call.groups} groups of adjacent channels",
            ),
        )
    ]


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::group_rational` where the site's output is computed."""
    call: Call = candidate.call
    out = copied[candidate.site.outs[0]]
    graph = module.graph
    with graph.inserting_before(out):
        x = copied[call.x]
        if call.split:
            value = x.meta["val"].flatten(-2)
            x = graph.call_function(aten.flatten.using_ints, (x, -2, -1))
            x.meta["val"] = value
        new = graph.call_function(
            GROUP_RATIONAL.overload,
            (x, copied[call.numerator], copied[call.denominator]),
            {"form": call.form, "sign0": 0},
        )
        new.meta = dict(out.meta)
        new.meta["val"] = x.meta["val"].new_empty(x.meta["val"].shape)
        set_in_place(new, out)
    return new


GROUP_RATIONAL_PASS = Pass(
    name="group_rational",
    op=GROUP_RATIONAL,
    exactness="reassociating",
    patterns=patterns,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
