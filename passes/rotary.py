"""Rotary position embedding in its spellings -> `ridgeline::rotary` (queries and keys together).

Law: see `ridgeline.ir.rotary`. Equal in real arithmetic; one rounding where a chain of 16-bit
operations has three. What `rotate` does is proven from the bounds of its slices and the place of
its sign, never from names; cos and sin are taken as they are. A query and a key that are turned by
the same cos and sin become one call. Source: Su et al., RoFormer.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ridgeline.cost_model import Work
from ridgeline.cost_model.pointwise import rotary_work
from ridgeline.ir.aliases import mutates
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.rotary import ROTARY
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import operand, stranger
from ridgeline.passes.rotary_turn import Turn, find_turns

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::rotary`, as nodes of the program.

    q, k: [B,H,S,D], or [B,S,H,D] where heads is 2; k None where one tensor is turned alone.
    cos, sin: four dimensions, of which `heads` is 1, or fewer, as they broadcast; angles: see
    `Turn`.
    """

    q: fx.Node
    k: fx.Node | None
    cos: fx.Node
    sin: fx.Node
    heads: int
    interleaved: bool
    angles: str


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Every turned tensor, those of the same cos and sin in pairs, and near misses."""
    turns, misses = find_turns(graph)
    sites: list[Site] = []
    alone: dict[tuple[object, ...], Turn] = {}
    for turn in turns:
        before = alone.pop(turn.shared, None)
        if before is None:
            alone[turn.shared] = turn
        elif _may_pair(before, turn):
            sites.append(_site(before, turn))
        else:
            sites.append(_site(before))
            alone[turn.shared] = turn
    sites += [_site(turn) for turn in alone.values()]
    good: list[Site] = []
    for site in sites:
        inside = set(site.nodes)
        problem = stranger(inside, site.outs)
        if problem is None:
            good.append(site)
        else:
            misses.append(problem)
    return good, misses


def _may_pair(first: Turn, second: Turn) -> bool:
    """Can both be computed where the second one is?"""
    heads = first.heads
    sizes = [[s for i, s in enumerate(shape_of(t.x)) if i != heads] for t in (first, second)]
    same = sizes[0] == sizes[1] and first.x.meta["val"].dtype == second.x.meta["val"].dtype
    return same and all(user > second.out for user in first.out.users)


def _site(first: Turn, second: Turn | None = None) -> Site:
    turns = (first,) if second is None else (first, second)
    bind = {"q": first.x, "cos": first.cos, "sin": first.sin}
    if second is not None:
        bind["k"] = second.x
    nodes = tuple(sorted({n for t in turns for n in t.nodes}))
    literals = {"heads": float(first.heads)}
    form = "interleaved" if first.interleaved else "half_split"
    return Site(bind, literals, nodes, tuple(t.out for t in turns), f"{form}, {first.angles}")


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes; state the work on both sides."""
    b = site.bind
    tensors = [b["q"], *((b["k"],) if "k" in b else ())]
    for x, out in zip(tensors, site.outs, strict=True):
        dtypes = x.meta["val"].dtype, out.meta["val"].dtype
        if dtypes[0] != dtypes[1] or dtypes[0] not in _DTYPES:
            return Reject(
                f"{said(x)} is {dtypes[0]} and what it is turned to {dtypes[1]}; both must have one"
                " dtype out of float32, bfloat16, float16",
                out,
                "cast cos and sin, or the result, to the dtype of the query",
            )
    form, angles = site.pattern.split(", ")
    call = Call(
        b["q"], b.get("k"), b["cos"], b["sin"], int(site.literals["heads"]),
        form == "interleaved", angles,
    )  # fmt: skip
    size = int(shape_of(b["cos"])[-1]) * (1 if angles == "each feature" else 2)
    turned = "neighbours" if call.interleaved else "halves"
    return [
        Candidate(
            rewrite=ROTARY_EMBEDDING,
            site=site,
            call=call,
            before=_work(site, setting, ours=False),
            after=_work(site, setting, ours=True),
            preconditions=(
                f"features 0 to {size - 1} of {' and '.join(x.name for x in tensors)} are turned in"
                f" {turned}, by slices and sign",
                "cos and sin are used as given",
            ),
        )
    ]


def _work(site: Site, setting: Setting, *, ours: bool) -> Work:
    def elements(node: fx.Node) -> int:
        return math.prod(numbers(node.meta["val"].shape))

    tensors = [site.bind[n] for n in ("q", "k") if n in site.bind]
    stored = [
        elements(x)
        for x, out in zip(tensors, site.outs, strict=True)
        if any(user.target in _STORES for user in out.users)
    ]
    parts = {site.bind["cos"], site.bind["sin"]}
    angles = sum(elements(x) * x.meta["val"].dtype.itemsize for x in parts)
    if ours and not site.pattern.endswith("each feature"):
        angles *= 2  # each read as two
    dtype = tensors[0].meta["val"].dtype
    return rotary_work(
        [elements(x) for x in tensors],
        angles,
        dtype,
        kind=setting.target.kind,
        ours=ours,
        stored=sum(stored),
        complex_product=site.pattern.endswith("complex"),
    )


_STORES = (
    aten.cat.default,
    aten.copy_.default,
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.index_put.default,
    aten.index_put_.default,
)
"""What writes a key into a cache: the compiler of the rest turns the key in the same loop, which
after the rewrite reads it again."""


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::rotary` where the last of the site's outputs is computed."""
    call: Call = candidate.call
    graph, outs = module.graph, [copied[o] for o in candidate.site.outs]
    last = copied[max(candidate.site.outs)]
    constant = not mutates(candidate.site.outs[0].graph)

    def insert(target, *args, **kwargs) -> fx.Node:
        for known in args[0].users if constant else ():
            if (known.target, known.args, known.kwargs) == (target, args, kwargs) and known < last:
                return known  # the angles of another layer
        new = graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with values[0][0].fake_mode:
            new.meta["val"] = target(*values[0], **values[1])
        return new

    with graph.inserting_before(last):
        q = operand(candidate, copied, call.q)
        k = None if call.k is None else operand(candidate, copied, call.k)
        if call.heads == 2:
            q = insert(aten.transpose.int, q, 1, 2)
            k = None if k is None else insert(aten.transpose.int, k, 1, 2)
        if k is None:  # no heads of a key
            k = insert(aten.slice.Tensor, q, 1, 0, 0)
        angles = [operand(candidate, copied, x) for x in (call.cos, call.sin)]
        if call.angles == "complex":
            angles = _real_and_imaginary(angles[0], constant, insert)
        angles = [_per_position(x, call.heads, insert) for x in angles]
        if call.angles != "each feature":
            angles = [_per_feature(x, call.interleaved, insert) for x in angles]
        new = insert(ROTARY.overload, q, k, *angles, interleaved=call.interleaved)
        new.meta |= {x: v for x, v in last.meta.items() if x in ("nn_module_stack", "stack_trace")}
        results = [_item(graph, new, i) for i in range(len(outs))]
        if call.heads == 2:
            results = [insert(aten.transpose.int, r, 1, 2) for r in results]
    for out, result in zip(outs, results, strict=True):
        out.replace_all_uses_with(result)
    return new


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """Output `index` of a call with several."""
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def _per_position(angle: fx.Node, heads: int, insert) -> fx.Node:
    """cos or sin as [1|B,S,R]."""
    dims = angle.meta["val"].dim()
    if dims == 4:
        return insert(aten.select.int, angle, heads, 0)
    if heads == 2:  # [S,1,R]
        angle, dims = insert(aten.select.int, angle, 1, 0), 2
    return angle if dims == 3 else insert(aten.unsqueeze.default, angle, 0)


def _real_and_imaginary(angle: fx.Node, constant: bool, insert) -> list[fx.Node]:
    """constant: nothing is written in place, so what `angle` was made of still is as it was."""
    if constant and angle.target is aten.complex.default:
        parts = list(angle.args)
        if all(shape_of(part) == shape_of(angle) for part in parts):
            return parts
    return [insert(part, angle) for part in (aten.real.default, aten.imag.default)]


def _per_feature(angle: fx.Node, interleaved: bool, insert) -> fx.Node:
    """[1|B,S,R/2], one value for each pair -> [1|B,S,R]."""
    if interleaved:
        return insert(aten.repeat_interleave.self_int, angle, 2, -1)
    return insert(aten.repeat.default, angle, [1, 1, 2])


ROTARY_EMBEDDING = Pass(
    name="rotary",
    op=ROTARY,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
