"""What the two norm passes share: from a matched site to candidates, and from those to a graph.

A norm s -> y becomes one operation on s, in the dtype that leaves the site: the casts that a model
makes on the way (to fp32 before the square, back before or after the weight) are rounding that the
law leaves out. Where s is the sum of two tensors of its shape, as in a residual stream, a second
candidate takes the addition in as well and returns y and s.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ridgeline.cost_model import Norm, Stream, Work
from ridgeline.ir.match import Pattern, Reject, Site
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.op import Op
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_SIZE = 16384
"""Elements of a row that the GPU kernel holds in registers."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of a norm operation, as nodes of the program.

    x: what is normalised, or with a residual its other summand. options: the keyword arguments.
    parameters: how many of weight and bias the operation takes by position.
    """

    x: fx.Node
    residual: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    parameters: int
    options: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """plain, with_residual: the operations; center: LayerNorm."""

    rewrite: Callable[[], Pass]
    plain: Op
    with_residual: Op
    center: bool


def sized(pattern: Pattern) -> Pattern:
    """The pattern of one fused call whose `normalized_shape` is one number, the literal `size`."""
    marker = 0.61
    pattern.outs[0].update_arg(1, [marker])
    return dataclasses.replace(pattern, literals={**pattern.literals, marker: "size"})


def is_parameter(node: fx.Node, x: fx.Node) -> bool:
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
    return len(others) == 1 and isinstance(others[0], fx.Node) and is_parameter(others[0], x)


def part_of_larger(site: Site, family: Family) -> bool:
    """Does a larger pattern take in this site, with its weight or bias?"""
    out, x = site.outs[0], site.bind["x"]
    if "size" in site.literals:
        return False
    if "weight" not in site.bind:
        return _applied(out, x, aten.mul.Tensor)
    return family.center and "bias" not in site.bind and _applied(out, x, aten.add.Tensor)


def smaller_suffices(site: Site) -> bool:
    """Is what is bound as weight or bias a gate, say, or a residual? A site ends before it."""
    given = (site.bind[name] for name in ("weight", "bias") if name in site.bind)
    return "size" not in site.literals and not all(is_parameter(n, site.bind["x"]) for n in given)


def centered(x: fx.Node) -> bool:
    """Is it a - mean(a) over the last dimension?"""
    if x.target is not aten.sub.Tensor:
        return False
    a, mean = x.args
    means = isinstance(mean, fx.Node) and mean.target is aten.mean.dim
    return means and mean.args[0] is a and mean.args[1:2] == ([-1],)


def candidates(family: Family, site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Every candidate for a site that binds x, and perhaps `again` (x once more), weight, bias,
    and whose literals are eps and perhaps shift."""
    site = _with_final_cast(site)
    out, x = site.outs[0], site.bind["x"]
    if refusal := _refused(site, setting):
        return refusal
    x = _in_dtype(x, out.meta["val"].dtype)
    weight, bias = (_source(site.bind.get(name)) for name in ("weight", "bias"))
    options = {"eps": site.literals["eps"]}
    if not family.center:
        options["shift"] = site.literals.get("shift", 0.0)
    call = Call(x, None, weight, bias, 2 if family.center else 1, tuple(options.items()))
    forms = [_candidate(family, site, call)]
    summed = _residual_form(site, call)
    return forms if summed is None else [_candidate(family, *summed), *forms]


def _with_final_cast(site: Site) -> Site:
    """The site with the cast of its result, where the result is read by that cast alone."""
    out = site.outs[0]
    users = list(out.users)
    if len(users) != 1 or not is_cast(users[0]):
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
    return torch.promote_types(before, after) == after


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
            f"the mean is of {x.name}, and {again.name} is what is scaled by it",
            again,
            f"scale {x.name}",
        )
    size = shape_of(x)[-1] if shape_of(x) else None
    if size is None or not size.is_Integer:
        return Reject(
            f"the rows of {x.name} have {size} elements; the kernels take a fixed number",
            x,
            "keep the last dimension static",
        )
    if "size" in site.literals and site.literals["size"] != size:
        return Reject(
            f"{out.name} normalises over {int(site.literals['size'])} elements of rows of {size}",
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
        if node is not None and not is_parameter(node, x):
            return Reject(
                f"the {name} {node.name} has shape {shape_of(node)}; the kernels take [{size}]",
                node,
                "use one number per element of a row",
            )
    tensors = (x, out, *(_source(site.bind[n]) for n in ("weight", "bias") if n in site.bind))
    unknown = {n.meta["val"].dtype for n in tensors if n is not None} - set(DTYPES)
    if unknown:
        return Reject(
            f"{out.name} computes in {', '.join(map(str, unknown))}; the kernels take"
            f" {', '.join(map(str, DTYPES))}",
            out,
            "use one of these dtypes",
        )
    before, after = _in_dtype(x, out.meta["val"].dtype).meta["val"].dtype, out.meta["val"].dtype
    if before != after and torch.promote_types(before, after) == after:
        return Reject(
            f"{out.name} is {after} and what it normalises {before}; the kernels do not widen",
            out,
            f"cast {x.name} to {after}, or {out.name} to {before}",
        )
    if not (x.meta["val"].is_contiguous() and out.meta["val"].is_contiguous()):
        return Reject(
            f"the rows of {x.name} or {out.name} do not lie in memory one after the other",
            x,
            "normalise a contiguous tensor",
        )
    return None


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
    if len(alike) != 1 or x is residual or not total.meta["val"].is_contiguous():
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
    return (whole, with_residual) if max(needed) < place(whole) else None


def place(site: Site) -> fx.Node:
    """The node before which all of the site's results must be there."""
    inside = set(site.nodes)
    strangers = [u for out in site.outs for u in out.users if u not in inside]
    return min((site.outs[0], *strangers))


def _candidate(family: Family, site: Site, call: Call) -> Candidate:
    before, after = _work(family, site, call)
    said = [f"mean over the last dimension, eps {dict(call.options)['eps']:g}"]
    if call.weight is not None:
        said.append(f"one weight per element of a row ({call.weight.name})")
    if call.residual is not None:
        said.append(f"{site.outs[1].name} adds two tensors of one shape and dtype")
    return Candidate(
        rewrite=family.rewrite(),
        site=site,
        call=call,
        before=before,
        after=after,
        variant="with the addition before it" if call.residual is not None else "",
        preconditions=tuple(said),
    )


def _work(family: Family, site: Site, call: Call) -> tuple[Work, Work]:
    """What is run now, and what would be.

    Inductor makes one kernel of a norm, its casts and the addition before it, and of pointwise
    neighbours besides: what flows between those and the norm is in memory only after the rewrite.
    """
    total = call.x if call.residual is None else site.outs[1]
    rows = Norm(
        rows=_numel(total) // (size := _hints(total)[-1]),
        size=size,
        dtype=total.meta["val"].dtype,
        center=family.center,
        residual=call.residual is not None,
        library="inductor",
    )
    own = dataclasses.replace(rows, library="ridgeline")
    inside = set(site.nodes)
    out = site.outs[0]
    passed = [
        node
        for node in (call.x, call.residual)
        if node is not None and _pointwise(node) and inside.issuperset(node.users)
    ]
    if out.users and all(map(_pointwise, out.users)):
        passed.append(out)
    through = (Stream(_bytes(node), _bytes(node), 0, own.dtype) for node in passed)
    return Work((rows,)), Work((own, *through))


def _pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or is_cast(node)


def _hints(node: fx.Node) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape)


def _numel(node: fx.Node) -> int:
    total = 1
    for size in _hints(node):
        total *= size
    return total


def _bytes(node: fx.Node) -> float:
    return float(_numel(node) * node.meta["val"].dtype.itemsize)


def apply(
    family: Family,
    candidate: Candidate,
    copied: Mapping[fx.Node, fx.Node],
    module: fx.GraphModule,
) -> fx.Node:
    """Put the operation where its results are first needed, and its results in their places."""
    call, site, graph = candidate.call, candidate.site, module.graph
    out = copied[site.outs[0]]
    parameters = [None if p is None else copied[p] for p in (call.weight, call.bias)]
    arguments: list[Any] = [copied[call.x]]
    op = family.plain
    if call.residual is not None:
        arguments.append(copied[call.residual])
        op = family.with_residual
    with graph.inserting_before(copied[place(site)]):
        new = graph.call_function(
            op.overload, (*arguments, *parameters[: call.parameters]), dict(call.options)
        )
        new.meta = dict(out.meta)
        results = [new]
        if call.residual is not None:
            results = [graph.call_function(operator.getitem, (new, i)) for i in range(2)]
    values = [_value(call.x)] * len(results)
    new.meta["val"] = values[0] if call.residual is None else tuple(values)
    for old, result, value in zip(site.outs, results, values, strict=True):
        result.meta = {**copied[old].meta, "val": value}
        dtype = old.meta["val"].dtype
        if value.dtype != dtype:
            with graph.inserting_before(copied[place(site)]):
                result = graph.call_function(aten.to.dtype, (result, dtype))
            result.meta = dict(copied[old].meta)
        copied[old].replace_all_uses_with(result)
    return new


def _value(x: fx.Node) -> torch.Tensor:
    """The fake result for rows like x's, which are contiguous."""
    value = x.meta["val"]
    return value.new_empty(value.shape)
