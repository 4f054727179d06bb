"""Reading a graph upwards: what the passes that find their sites by themselves have in common."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import operation, said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int)


def through_casts(value: Any, seen: set[fx.Node]) -> Any:
    """The value behind floating casts, which are added to `seen`."""
    while isinstance(value, fx.Node) and is_cast(value):
        seen.add(value)
        value = value.args[0]
    return value


def cast_back(out: fx.Node, x: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The result in x's dtype, where a cast right behind it makes that."""
    users = list(out.users)
    if out.meta["val"].dtype != x.meta["val"].dtype and len(users) == 1 and is_cast(users[0]):
        inside.add(users[0])
        return users[0]
    return out


def negated(value: Any, seen: set[fx.Node]) -> fx.Node | None:
    """x where the value is -x; the nodes on the way are added to `seen`."""
    inside: set[fx.Node] = set()
    value = through_casts(value, inside)
    if not isinstance(value, fx.Node):
        return None
    if value.target is aten.mul.Tensor and -1 in value.args:
        x = next(a for a in value.args if a != -1)
    elif value.target is aten.neg.default:
        x = value.args[0]
    else:
        return None
    seen |= {value, *inside}
    return through_casts(x, seen)


def is_floating(value: Any) -> bool:
    """Is it a node of a floating (not complex) tensor?"""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def orders(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The operands of a commutative call, in both orders."""
    a, b = node.args[:2]
    yield a, b
    yield b, a


def last_dim(node: fx.Node, dim: Any) -> bool:
    """Is `dim` the last dimension of the node's tensor?"""
    return dim in (-1, node.meta["val"].dim() - 1)


def interval(node: Any) -> tuple[fx.Node, sympy.Expr, sympy.Expr, int] | None:
    """(x, start, end, step) where the node is x[..., start:end:step]: slice, chunk, split, or
    select and unbind of the last dimension viewed as two.

    A node that is neither is the whole of itself.
    """
    if not is_floating(node) or not node.meta["val"].dim():
        return None
    if node.target is aten.slice.Tensor:
        x, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        size = shape_of(x)[-1]
        if not last_dim(x, dim) or not isinstance(step, int):
            return None
        bounds = [_bound(start, size, sympy.Integer(0)), _bound(end, size, size)]
        return None if None in bounds else (x, bounds[0], bounds[1], step)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        parts, index = node.args
        splits = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
        if parts.target is aten.unbind.int:
            return _of_two(node) or (node, sympy.Integer(0), shape_of(node)[-1], 1)
        if parts.target not in (*splits, aten.split.sizes) or len(parts.args) < 3:
            return None
        x = parts.args[0]
        sizes = [shape_of_value(v) for v in parts.meta["val"]]
        if not last_dim(x, parts.args[2]):
            return None
        start = sum((s[-1] for s in sizes[:index]), sympy.Integer(0))
        return x, start, start + sizes[index][-1], 1
    return _of_two(node) or (node, sympy.Integer(0), shape_of(node)[-1], 1)


def _of_two(node: fx.Node) -> tuple[fx.Node, sympy.Expr, sympy.Expr, int] | None:
    """x[..., i * m : (i + 1) * m] or x[..., i::m], taken of x viewed as [..., n, m]."""
    if node.target is aten.select.int:
        viewed, dim, index = node.args
    elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        parts, index = node.args
        if parts.target is not aten.unbind.int:
            return None
        viewed, dim = (*parts.args, 0)[:2]
    else:
        return None
    if viewed.target not in VIEWS or not isinstance(index, int):
        return None
    x, sizes = viewed.args[0], shape_of(viewed)
    if [*sizes[:-2], sizes[-2] * sizes[-1]] != shape_of(x) or not sizes[-1].is_Integer:
        return None
    rank, width = len(sizes), int(sizes[-1])
    if dim % rank == rank - 1:
        return x, sympy.Integer(index % width), shape_of(x)[-1], width
    if dim % rank == rank - 2 and index >= 0:
        return x, sympy.Integer(index * width), sympy.Integer((index + 1) * width), 1
    return None


def shape_of_value(value: torch.Tensor) -> list[sympy.Expr]:
    """Sizes of a fake tensor as expressions."""
    return [sympy.Integer(s) if isinstance(s, int) else s.node.expr for s in value.shape]


def _bound(value: Any, size: sympy.Expr, default: sympy.Expr) -> sympy.Expr | None:
    """A slice's bound as a place from the start; None where that is not known."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            return value.node.expr
    if not isinstance(value, int):
        return None
    if value < 0:
        return size + value
    if not size.is_Integer:
        return size if value >= 2**62 else sympy.Integer(value)
    return sympy.Min(size, value)


def stranger(interior: Collection[fx.Node], outs: Sequence[fx.Node]) -> Reject | None:
    """A refusal where a value inside the site is used outside."""
    for node in sorted(set(interior) - set(outs)):
        other = next((u for u in node.users if u not in interior), None)
        if other is not None:
            return Reject(
                f"{said(node)}, inside the site, is also read by {said(other)}",
                node,
                f"drop that other use of '{operation(node)}'",
                depth=100,
            )
    return None


def operand(candidate: Candidate, copied: Mapping[fx.Node, fx.Node], wanted: fx.Node) -> fx.Node:
    """The node of the copy that now stands for `wanted`: what the site's nodes read in its place.

    Another rewrite may have replaced what computed it.
    """
    for node in candidate.site.nodes:
        now: list[fx.Node] = []
        before: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), before.append)
        fx.node.map_arg((copied[node].args, copied[node].kwargs), now.append)
        if wanted in before:
            return now[before.index(wanted)]
    return copied[wanted]
