"""A group-wise rational function in plain ATen -> `ridgeline::group_rational`.

Law: see `ridgeline.ir.group_rational`. Anchored at the division, whose two sides are read as
polynomials by `ridgeline.ir.rational_terms`, so that Horner's rule, explicit powers and KAT's
stacked powers are one pattern. The form is what the graph computes, never another one; the sign of
0 is autograd's, so that gradients stay those of the graph. Equal in real arithmetic.
Source: the public KAT_Group and FlashKAT_Group classes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels, for training too
from ridgeline.cost_model import Stream, Work, work_of
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.match import Pattern, Reject, Site, trace
from ridgeline.ir.provenance import said
from ridgeline.ir.rational_terms import Rational, read_quotient
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import VIEWS

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COPIES = (aten.contiguous.default, aten.clone.default)
_NEVER = 1 << 30
"""Divisions are common: that one is no quotient of tensors is not worth a line of the account."""


def quotient(top: Tensor, bottom: Tensor) -> Tensor:
    return top / bottom


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The anchor; `accepts` reads what stands above it."""
    traced = trace(quotient, aten.div.Tensor, top=torch.empty(2, 3), bottom=torch.empty(2, 3))
    return (dataclasses.replace(traced, near=_NEVER),)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::group_rational`, as nodes of the program.

    split: x is [..., G, C / G] and not yet [..., C]; joined: the site's output is [..., C].
    """

    x: fx.Node
    numerator: fx.Node
    denominator: fx.Node
    form: str
    groups: int
    split: bool
    joined: bool


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Read the quotient, settle where groups lie and that nothing else reads the interior."""
    div = site.outs[0]
    reader = read_quotient(div)
    found = reader.found
    if reader.columns < 2:  # an ordinary division
        return []
    if isinstance(found, str):
        return Reject(
            f"the quotient {said(div)} is no rational function: {found}",
            div,
            "write it in a form that ridgeline.ir.group_rational lists, or use"
            " ridgeline.nn.GroupRational",
        )
    groups = max(int(n.meta["val"].shape[0]) for n in (found.numerator, found.denominator))
    placed = _placed(found, div, groups)
    if isinstance(placed, Reject):
        return placed
    call, around, out = placed
    dtypes = {n.meta["val"].dtype for n in (call.x, out)}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return Reject(
            f"{said(call.x)} and {said(out)} have dtypes {sorted(map(str, dtypes))}; one of"
            " float32, bfloat16, float16 is needed",
            out,
            "cast the coefficients to the activations' dtype",
        )
    interior = (reader.nodes | around) - {call.x, call.numerator, call.denominator}
    for node in sorted(interior - {out}):
        stranger = next((u for u in node.users if u not in interior), None)
        if stranger is not None:
            return Reject(
                f"{said(node)}, inside the site, is also read by {said(stranger)}",
                node,
                f"drop the other use of {said(node)} ({said(stranger)})",
            )
    nodes = tuple(n for n in div.graph.nodes if n in interior)
    bind = {"x": call.x, "numerator": call.numerator, "denominator": call.denominator}
    m, n = (int(n.meta["val"].shape[1]) for n in (call.numerator, call.denominator))
    return [
        Candidate(
            rewrite=GROUP_RATIONAL_PASS,
            site=dataclasses.replace(site, bind=bind, nodes=nodes, outs=(out,)),
            call=call,
            before=sum((work_of(n) for n in nodes), Work()),
            after=_work(call),
            preconditions=(
                f"the denominator has form {call.form}",
                f"degrees {m - 1} and {n}, the columns of one matrix each",
                f"{groups} groups of adjacent channels",
            ),
        )
    ]


def _placed(
    found: Rational, div: fx.Node, groups: int
) -> tuple[Call, set[fx.Node], fx.Node] | Reject:
    """The call, the views around it that fall away, and the node that it replaces."""
    base = found.x
    sizes, rows = shape_of(base), {int(n.meta["val"].shape[0]) for n in _matrices(found)}
    call = Call(base, found.numerator, found.denominator, found.form, groups, False, False)
    unfit = Reject(
        f"{said(base)} of shape {sizes} does not split into {groups} groups of adjacent channels",
        base,
        "view the activations as [..., groups, channels / groups]",
    )
    if not rows <= {1, groups}:
        return unfit
    if groups == 1:
        return dataclasses.replace(call, joined=True), set(), div
    if len(sizes) == 2 and sizes[0] == groups and _has_rows(div):
        return _turned(call, div) or unfit
    if len(sizes) < 2 or sizes[-2] != groups or not sizes[-1].is_Integer:
        return unfit
    inner = base.args[0] if base.target in VIEWS else None
    whole = inner is not None and shape_of(inner) == [*sizes[:-2], groups * sizes[-1]]
    if whole:
        return dataclasses.replace(call, x=inner), {base}, div
    return dataclasses.replace(call, split=True), set(), div


def _matrices(found: Rational) -> tuple[fx.Node, fx.Node]:
    return found.numerator, found.denominator


def _has_rows(div: fx.Node) -> bool:
    """Is each side a product over stacked powers, so that the first dimension is the group?"""
    return all(side.target is aten.squeeze.dim for side in div.args)


def _turned(call: Call, div: fx.Node) -> tuple[Call, set[fx.Node], fx.Node] | None:
    """x [..., C] -> [..., G, C/G] -> [G, ..., C/G] -> [G, N], and the way back below `div`."""
    around = {call.x}
    up = _through(call.x.args[0] if call.x.target in VIEWS else None, around)
    if up is None or up.target is not aten.permute.default:
        return None
    split = up.args[0]
    rank = len(shape_of(split))
    lead = list(range(rank - 2))
    if list(up.args[1]) != [rank - 2, *lead, rank - 1] or split.target not in VIEWS:
        return None
    x, sizes = split.args[0], shape_of(split)
    turned = [sizes[-2], *sizes[:-2], sizes[-1]]
    if sizes[-2] != call.groups or shape_of(x) != [*sizes[:-2], sizes[-2] * sizes[-1]]:
        return None
    around |= {up, split}
    opened = _only_user(div, VIEWS)
    if opened is None or shape_of(opened) != turned:
        return None
    back = _only_user(opened, (aten.permute.default,))
    if back is None or list(back.args[1]) != [*(i + 1 for i in lead), 0, rank - 1]:
        return None
    around |= {div, opened, back}
    copied = _only_user(back, _COPIES)
    if copied is not None:
        around.add(copied)
    out = _only_user(copied or back, VIEWS)
    if out is None or shape_of(out) != shape_of(x):
        return None
    around.add(out)
    return dataclasses.replace(call, x=x, joined=True), around, out


def _through(node: fx.Node | None, around: set[fx.Node]) -> fx.Node | None:
    """The node behind a copy."""
    if node is not None and node.target in _COPIES:
        around.add(node)
        return node.args[0]
    return node


def _only_user(node: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _work(call: Call) -> Work:
    x = call.x.meta["val"]
    held = [n.meta["val"] for n in (call.numerator, call.denominator)]
    elements = math.prod(numbers(x.shape))
    moved = elements * x.dtype.itemsize
    read = moved + sum(t.numel() * t.dtype.itemsize for t in held)
    flops = 2 * (held[0].shape[1] + held[1].shape[1]) * elements
    return Work((Stream(read, moved, flops, x.dtype),))


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
        result = new
        if not call.joined:
            width = out.meta["val"].shape[-1]
            result = graph.call_function(aten.unflatten.int, (new, -1, [call.groups, width]))
            result.meta = dict(out.meta)
    out.replace_all_uses_with(result)
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
