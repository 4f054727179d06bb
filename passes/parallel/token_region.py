"""The part of a graph that may be computed on a shard of the tokens: what follows all-reduces row
by row.

    seeds     the sums: wait(all_reduce(partial)), [..., H]
    region    what reads them row by row, with values that have no tokens or are replicated
    exits     its values that something else reads, which must be gathered

In a transformer the residual adds and the norms are such a region, and the exits are what the
norms give to the next projections. A residual stays in it from layer to layer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import operation, said
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.layouts import Layout
from ridgeline.passes.parallel.rows import (
    VIEWS,
    is_row_reduction,
    is_row_wise,
    keeps_rows,
    row_count,
    same_size,
)

functional = torch.ops._c10d_functional
PART = "part"
"""Metadata of a graph in two parts (`apart`): 0 or 1, of what a part computes for itself."""


@dataclass(frozen=True, slots=True)
class Region:
    """seeds: the waits; nodes: the whole region with them, in graph order; exits: see above."""

    tokens: sympy.Expr
    seeds: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]

    def readers(self, value: fx.Node) -> list[fx.Node]:
        """Those outside of the region."""
        inside = set(self.nodes)
        return [user for user in value.users if user not in inside]


def all_reduces(graph: fx.Graph) -> list[fx.Node]:
    """The waits on all-reduces, in graph order."""
    waits = graph.find_nodes(op="call_function", target=functional.wait_tensor.default)
    return [
        wait
        for wait in waits
        if isinstance(wait.args[0], fx.Node)
        and wait.args[0].target is functional.all_reduce.default
    ]


def find_regions(
    graph: fx.Graph, group: str, world: int, layouts: Mapping[fx.Node, Layout]
) -> tuple[list[Region], list[Reject]]:
    """The regions of the graph's all-reduces over `group`, one for each part that it is computed
    in, and why others are in none."""
    regions: list[Region] = []
    rejects: list[Reject] = []
    sums = all_reduces(graph)
    for part in dict.fromkeys(wait.meta.get(PART) for wait in sums):
        own = [wait for wait in sums if wait.meta.get(PART) == part]
        region, refused = _region(graph, own, group, world, layouts)
        regions += [region] if region is not None else []
        rejects += refused
    return regions, rejects


def _region(
    graph: fx.Graph,
    sums: Sequence[fx.Node],
    group: str,
    world: int,
    layouts: Mapping[fx.Node, Layout],
) -> tuple[Region | None, list[Reject]]:
    """The region of these all-reduces."""
    seeds: list[fx.Node] = []
    rejects: list[Reject] = []
    tokens: sympy.Expr | None = None
    for wait in sums:
        if reject := _unfit(wait, group, world, tokens):
            rejects.append(reject)
            continue
        tokens = row_count(wait)
        seeds.append(wait)
    while seeds:
        assert tokens is not None
        inside = _grown(graph, seeds, tokens, layouts)
        idle = [seed for seed in seeds if not _reaches_a_norm(seed, inside)]
        if not idle:
            for view in sorted((n for n in inside if n.target in VIEWS), reverse=True):
                if not any(user in inside for user in view.users):
                    inside.remove(view)  # views of one value are made of it once it is gathered
            nodes = tuple(sorted(inside))
            exits = tuple(n for n in nodes if any(u not in inside for u in n.users))
            exits = tuple(n for n in exits if isinstance(n.meta["val"], Tensor))
            return Region(tokens, tuple(seeds), nodes, exits), rejects
        rejects += [_no_norm(seed, inside) for seed in idle]
        seeds = [seed for seed in seeds if seed not in idle]
    return None, rejects


def _unfit(wait: fx.Node, group: str, world: int, tokens: sympy.Expr | None) -> Reject | None:
    """Why a sum cannot be scattered over the tokens, looking at it alone."""
    reduce = wait.args[0]
    _, kind, name = reduce.args
    rows = row_count(wait)
    if kind != "sum":
        return Reject(f"{said(reduce)} takes the {kind} over the ranks", reduce, "reduce by sum")
    if name != group:
        return Reject(
            f"{said(reduce)} is over the group {name!r}, and the model is split over {group!r}",
            reduce,
            "use one group",
        )
    if len(reduce.users) > 1:
        return Reject(f"{said(reduce)} is read besides its wait_tensor", reduce, "wait once")
    if rows is None:
        return Reject(f"{said(reduce)} sums a value without rows of tokens", reduce)
    if tokens is not None and not same_size(rows, tokens):
        return Reject(
            f"{said(reduce)} sums {rows} rows, and those before it {tokens}",
            reduce,
            "keep one number of tokens",
        )
    count = prod(numbers(reduce.meta["val"].shape[:-1]))
    if count < world:
        return Reject(f"{count} tokens are fewer than {world} ranks", reduce, "use larger batches")
    return None


def _grown(
    graph: fx.Graph,
    seeds: Collection[fx.Node],
    tokens: sympy.Expr,
    layouts: Mapping[fx.Node, Layout],
) -> set[fx.Node]:
    inside = set(seeds)
    for node in graph.nodes:
        reads = node.op == "call_function" and any(i in inside for i in node.all_input_nodes)
        if reads and node not in inside and _joins(node, inside, tokens, layouts):
            inside.add(node)
    return inside


def _joins(
    node: fx.Node,
    inside: Collection[fx.Node],
    tokens: sympy.Expr,
    layouts: Mapping[fx.Node, Layout],
) -> bool:
    """Is the node computed row by row of the tokens, from the region and replicated values?"""
    values = node.meta.get("val")
    several = isinstance(values, list | tuple)
    for value in values if several else (values,):
        if not isinstance(value, Tensor) or value.dim() < 2:
            return False
        rows = sympy.prod(
            sympy.Integer(s) if isinstance(s, int) else s.node.expr for s in value.shape[:-1]
        )
        if not same_size(rows, tokens):
            return False
    if node.target in VIEWS:
        return keeps_rows(node.args[0], node)
    outside = [n for n in node.all_input_nodes if n not in inside]
    replicated = all(layouts[n] is Layout.REPLICATED for n in outside)
    return is_row_wise(node) and replicated


def _reaches_a_norm(seed: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Does a norm or another reduction of rows, in the region, read the seed before other seeds'
    work ends?"""
    seen: set[fx.Node] = set()
    stack = [seed]
    while stack:
        node = stack.pop()
        if node in seen or node not in inside:
            continue
        if is_row_reduction(node):
            return True
        seen.add(node)
        stack.extend(node.users)
    return False


def _no_norm(seed: fx.Node, inside: Collection[fx.Node]) -> Reject:
    """A refusal that names what reads the sum, or what is computed from it, otherwise."""
    seen: list[fx.Node] = [seed]
    for node in seen:
        seen += [u for u in node.users if u in inside and u not in seen]
    blocking = next((u for n in seen for u in sorted(n.users) if u not in inside), seed)
    return Reject(
        f"no norm reads {said(seed)} row by row; {said(blocking)} reads all its tokens",
        blocking,
        f"normalise before '{operation(blocking)}'",
    )


def vector_like(node: fx.Node) -> bool:
    """Has the value no tokens: the same row, or number, for each?"""
    return all(size == 1 for size in shape_of(node)[:-1])
