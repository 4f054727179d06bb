"""The part of a graph that a candidate replaces, and whether it may be computed at one place."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import written_between
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.normalize import can_hold, is_cast
from ridgeline.ir.provenance import operation, said
from ridgeline.ir.sizes import number
from ridgeline.passes.base import Candidate

aten = torch.ops.aten


def frontier_of(candidate: Candidate) -> list[fx.Node]:
    """The nodes that the rewritten site reads, in a fixed order."""
    fields = dataclasses.fields(candidate.call)
    read = [n for f in fields for n in nodes_in(getattr(candidate.call, f.name))]
    return list(dict.fromkeys(read))


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes of a field of a call: itself, or those of a tuple."""
    if isinstance(value, tuple):
        return [n for each in value for n in nodes_in(each)]
    return [value] if isinstance(value, fx.Node) else []


def region_of(candidate: Candidate, frontier: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes between the frontier and the site's outputs, which are among them, in graph order.

    Sizes are among them, what sizes are computed from is not.
    """
    ends = set(frontier)
    needed: set[fx.Node] = set()
    stack = list(candidate.site.outs)
    while stack:
        node = stack.pop()
        if node in needed or node in ends:
            continue
        needed.add(node)
        if not isinstance(node.meta.get("val"), int | torch.SymInt):
            stack.extend(node.all_input_nodes)
    return sorted(needed)


def structure_of(region: Sequence[fx.Node]) -> str:
    """What a region computes, up to the names of its nodes and with symbolic sizes by value."""
    names: dict[fx.Node, str] = {}

    def spelled(node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            return str(number(value))
        return names.setdefault(node, f"%{len(names)}")

    return "\n".join(
        f"{spelled(n)} = {n.op} {n.target if n.op == 'call_function' else ''}"
        f" {fx.node.map_arg((n.args, n.kwargs), spelled)}"
        for n in region
    )


def rounds_inside(site: Site) -> Reject | None:
    """A refusal where the site casts a value of its own to a dtype that cannot hold its result, or
    not the range of what it reads: a rounding, or an overflow, that the model asks for."""
    result = site.outs[0]
    while len(result.users) == 1 and is_cast(user := next(iter(result.users))):
        result = user
    out = result.meta["val"].dtype
    reads = [_unwidened(n).meta.get("val") for n in site.bind.values()]
    tensors = [t for t in reads if isinstance(t, Tensor) and t.is_floating_point()]
    small = any(not can_hold(torch.float16, t.dtype) for t in tensors)
    for node in site.nodes:
        if node in site.outs or not is_cast(node) or _joins_a_result(node, site):
            continue
        narrow = node.meta["val"].dtype
        if not can_hold(narrow, out) or (small and narrow == torch.float16):
            return Reject(
                f"{said(node)} rounds to {narrow} inside, where the result is {out}",
                node,
                f"drop the cast to {narrow}",
            )
    return None


def _joins_a_result(node: fx.Node, site: Site) -> bool:
    """Is the value, rounded to the dtype of a result, put beside others as a part of it?"""
    dtype = node.meta["val"].dtype
    return all(
        user in site.outs and user.target is aten.cat.default and user.meta["val"].dtype == dtype
        for user in node.users
    )


def _unwidened(node: fx.Node) -> fx.Node:
    """The node behind casts that lose nothing."""
    while is_cast(node) and can_hold(node.meta["val"].dtype, node.args[0].meta["val"].dtype):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def changed_inside(candidate: Candidate) -> Reject | None:
    """A refusal where the program writes, between the site's first read and its output, memory
    that the site reads: the replacement reads everything at one place."""
    nodes = region_of(candidate, frontier_of(candidate) or candidate.site.bind.values())
    last = max(candidate.site.outs)
    found = written_between(nodes, last)
    if found is None:
        return None
    value, write = found
    return Reject(
        f"{said(write)} changes {said(value)} in place between its use here and {said(last)}",
        write,
        f"compute a new tensor in place of '{operation(write)}'",
    )
