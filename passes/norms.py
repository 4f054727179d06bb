"""RMSNorm and LayerNorm in any spelling -> `ridgeline::rms_norm`, `layer_norm`, `add_*`.

Laws: `ridgeline.ir.rms_norm` and `ridgeline.ir.layer_norm`. The rewrite is equal in real
arithmetic: everything is fp32 and rounded once, to the dtype that leaves the site; the roundings
that a model makes on the way (before the weight, say) are left out. Where what is normalised is a
sum of two tensors of its shape, as in a residual stream, a second candidate takes the addition in
and gives both results.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.match import Pattern, Reject, Site
from ridgeline.ir.normalize import can_hold, is_cast
from ridgeline.ir.op import Op
from ridgeline.ir.provenance import said
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.ir.symbolic import shape_of, size_expression
from ridgeline.passes import norm_spellings
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.norm_work import norm_work

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_SIZE = 16384
"""Elements of a row that the GPU kernel holds in registers."""


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The spellings left after normalisation, traced once."""
    return norm_spellings.patterns()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of a norm operation, as nodes of the program.

    x: what is normalised, or with a residual its other summand. center: LayerNorm; shift is
    RMSNorm's.
    """

    x: fx.Node
    residual: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    shift: float
    center: bool


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes, shapes and layout; state the work on both sides."""
    if "eps" not in site.literals:
        return Reject(
            f"{said(site.outs[0])} takes the eps that torch chooses for its dtype",
            site.outs[0],
            "name eps",
        )
    center = "layer_norm" in site.pattern
    if "size" not in site.literals and _other_site(site, center):
        return []
    site = _with_final_cast(site)
    if refusal := _refused(site, setting):
        return refusal
    x = _in_dtype(site.bind["x"], site.outs[0].meta["val"].dtype)
    weight, bias = (_source(site.bind.get(name)) for name in ("weight", "bias"))
    eps, shift = site.literals["eps"], site.literals.get("shift", 0.0)
    call = Call(x, None, weight, bias, eps, shift, center)
    forms = [_candidate(site, call)]
    summed = _residual_form(site, call)
    return forms if summed is None else [_candidate(*summed), *forms]


def _other_site(site: Site, center: bool) -> bool:
    """Does another pattern say more of the same norm?

    A larger one takes in its weight or bias, or the mean that LayerNorm subtracts; a smaller one
    ends before a gate or a residual that this one took for a weight or bias.
    """
    out, x = site.outs[0], site.bind["x"]
    given = [site.bind[name] for name in ("weight", "bias") if name in site.bind]
    if not all(_is_parameter(node, x) for node in given) or (not center and _centered(x)):
        return True
    if "weight" not in site.bind:
        return _applied(out, x, aten.mul.Tensor)
    return center and "bias" not in site.bind and _applied(out, x, aten.add.Tensor)


def _is_parameter(node: fx.Node, x: fx.Node) -> bool:
    """One number per element of the rows of x?"""
    source = _source(node)
    return source is not None and shape_of(source) == shape_of(x)[-1:]


def _applied(out: fx.Node, x: fx.Node, target: Any) -> bool:
    """Is what the node gives, cast or not, read by one `target` call with a parameter?"""
    users = list(out.users)
    if len(users) != 1:
        return False
    user = users[0]
    if is_cast(user):
        return _applied(user, x, target)
    others = [a for a in user.args if a is not out] if user.target is target else []
    return len(others) == 1 and isinstance(others[0], fx.Node) and _is_parameter(others[0], x)


def _centered(x: fx.Node) -> bool:
    """Is it a - mean(a) over the last dimension?"""
    if x.target is not aten.sub.Tensor:
        return False
    a, mean = x.args
    means = isinstance(mean, fx.Node) and mean.target is aten.mean.dim
    return means and mean.args[0] is a and mean.args[1:2] == ([-1],)


def _with_final_cast(site: Site) -> Site:
    """The site with the cast of its result, where the result is read by that cast alone."""
    out = site.outs[0]
    users = list(out.users)
    if len(users) != 1 or not is_cast(users[0]) or _widens(users[0]):
        return site
    if users[0].meta["val"].dtype not in DTYPES:
        return site
    return dataclasses.replace(site, nodes=(*site.nodes, users[0]), outs=(users[0],))


def _source(node: fx.Node | None) -> fx.Node | None:
    """The node behind casts that only widen."""
    while node is not None and _widens(node):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _widens(node: fx.Node) -> bool:
    if not is_cast(node):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # pyright: ignore
    return can_hold(after, before)


def _in_dtype(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """x, or what it was before casts that only widen, where that has `dtype`."""
    node = x
    while node.meta["val"].dtype != dtype:
        if not _widens(node):
            return x
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _refused(site: Site, setting: Setting) -> Reject | None:
    x, out = site.bind["x"], site.outs[0]
    again = site.bind.get("again", x)
    if _source(again) is not _source(x):
        return Reject(
            f"the mean is of {said(x)}, and {said(again)} is what is scaled by it",
            again,
            f"scale {said(x)}",
        )
    size = shape_of(x)[-1] if shape_of(x) else None
    if size is None or not size.is_Integer:
        return Reject(
            f"the rows of {said(x)} have {size} elements; the kernels take a fixed number",
            x,
            "keep the last dimension static",
        )
    if "size" in site.literals and site.literals["size"] != size:
        return Reject(
            f"{said(out)} normalises over {int(site.literals['size'])} elements of rows of {size}",
            out,
            "normalise over the last dimension",
        )
    if setting.target.kind != "cpu" and size > GPU_SIZE:
        return Reject(
            f"a row of {size} elements does not fit the registers of one block ({GPU_SIZE})",
            x,
            f"normalise over at most {GPU_SIZE} elements",
        )
    for name in ("weight", "bias"):
        node = site.bind.get(name)
        if node is not None and not _is_parameter(node, x):
            return Reject(
                f"the {name} {said(node)} has shape {shape_of(node)}; the kernels take [{size}]",
                node,
                "use one number per element of a row",
            )
    tensors = (x, out, *(_source(site.bind[n]) for n in ("weight", "bias") if n in site.bind))
    unknown = {n.meta["val"].dtype for n in tensors if n is not None} - set(DTYPES)
    if unknown:
        return Reject(
            f"{said(out)} computes in {', '.join(map(str, unknown))}; the kernels take"
            f" {', '.join(map(str, DTYPES))}",
            out,
            "use one of these dtypes",
        )
    before, after = _in_dtype(x, out.meta["val"].dtype).meta["val"].dtype, out.meta["val"].dtype
    if before != after and can_hold(after, before):
        return Reject(
            f"{said(out)} is {after} and what it normalises {before}; the kernels do not widen",
            out,
            f"cast {said(x)} to {after}, or {said(out)} to {before}",
        )
    if not (_in_order(x) and _in_order(out)):
        return Reject(
            f"the rows of {said(x)} or {said(out)} do not lie in memory one after the other",
            x,
            "normalise a contiguous tensor",
        )
    return None


def _in_order(node: fx.Node) -> bool:
    """Do the elements lie in memory in the order of the dimensions, for every size?"""
    expected = sympy.Integer(1)
    strides = node.meta["val"].stride()
    for size, stride in zip(reversed(shape_of(node)), reversed(strides), strict=True):
        if size != 1 and sympy.expand(size_expression(stride) - expected) != 0:
            return False
        expected *= size
    return True


def _residual_form(site: Site, call: Call) -> tuple[Site, Call] | None:
    """The site and call with the addition that makes x; None where there is no such addition, or
    its sum is needed before all that the operation reads is there."""
    total = call.x
    if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    x, residual = total.args
    if not (isinstance(x, fx.Node) and isinstance(residual, fx.Node)):
        return None
    alike = {(n.meta["val"].dtype, tuple(shape_of(n))) for n in (x, residual, total)}
    if len(alike) != 1 or x is residual or not _in_order(total):
        return None
    casts = []
    node = site.bind["x"]
    while node is not total:
        casts.append(node)
        node = node.args[0]
    inside = {*site.nodes, *casts}
    if any(user not in inside for cast in casts for user in cast.users):
        casts = []  # a cast that others read stays where it is
    nodes = tuple(sorted({*site.nodes, *casts, total}))
    whole = dataclasses.replace(site, nodes=nodes, outs=(site.outs[0], total))
    with_residual = dataclasses.replace(call, x=x, residual=residual)
    needed = [n for n in (x, residual, call.weight, call.bias) if n is not None]
    return (whole, with_residual) if max(needed) < _place(whole.outs, set(nodes)) else None


def _place(outs: tuple[fx.Node, ...], inside: set[fx.Node]) -> fx.Node:
    """The node before which all results must be there: the first one's, or an earlier reader."""
    return min((outs[0], *(u for out in outs for u in out.users if u not in inside)))


def _candidate(site: Site, call: Call) -> Candidate:
    summed = call.residual is not None
    read = [n for n in (call.x, call.residual) if n is not None]
    before, after = norm_work(
        site, site.outs[1] if summed else call.x, read, center=call.center, residual=summed
    )
    proven = [f"mean over the last dimension, eps {call.eps:g}"]
    if call.weight is not None:
        proven.append(f"one weight per element of a row ({said(call.weight)})")
    if summed:
        proven.append(f"{said(site.outs[1])} adds two tensors of one shape and dtype")
    return Candidate(
        rewrite=NORMS,
        site=site,
        call=call,
        before=before,
        after=after,
        variant=("LayerNorm" if call.center else "RMSNorm") + (" of a sum" if summed else ""),
        preconditions=tuple(proven),
    )


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put the operation where its results are first needed, and its results in their places."""
    call, site, graph = candidate.call, candidate.site, module.graph
    outs = tuple(copied[out] for out in site.outs)
    place = _place(outs, {copied[node] for node in site.nodes})
    parameters = (call.weight, call.bias) if call.center else (call.weight,)
    rows = [copied[n] for n in (call.x, call.residual) if n is not None]
    options = {"eps": call.eps} if call.center else {"eps": call.eps, "shift": call.shift}
    value = call.x.meta["val"].new_empty(call.x.meta["val"].shape)
    with graph.inserting_before(place):
        new = graph.call_function(
            _operation(call).overload,
            (*rows, *(None if p is None else copied[p] for p in parameters)),
            options,
        )
        new.meta = {**outs[0].meta, "val": (value, value) if len(outs) > 1 else value}
        results = [new]
        if len(outs) > 1:
            results = [graph.call_function(operator.getitem, (new, i)) for i in range(2)]
        for old, result in zip(outs, results, strict=True):
            result.meta = {**old.meta, "val": value}
            dtype = old.meta["val"].dtype
            if dtype != value.dtype:
                result = graph.call_function(aten.to.dtype, (result, dtype))
                result.meta = dict(old.meta)
            old.replace_all_uses_with(result)
    return new


def _operation(call: Call) -> Op:
    if call.center:
        return LAYER_NORM if call.residual is None else ADD_LAYER_NORM
    return RMS_NORM if call.residual is None else ADD_RMS_NORM


NORMS = Pass(
    name="norm",
    op=RMS_NORM,
    exactness="reassociating",
    patterns=patterns,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 5e-7, "bfloat16": 4e-3, "float16": 6e-4},
)
