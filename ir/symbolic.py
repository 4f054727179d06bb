"""Tensors as functions of their index: what a mask builder computes, for every size at once.

A node such as ``arange(n)[None, :] <= arange(n)[:, None]`` is read as a sympy expression over the
index symbols i0, i1, ... of its own dimensions and the size symbols of the program. Only what is
certain gets an expression; every other node gives None, and its value stays unknown.
"""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

aten = torch.ops.aten
Expression = sympy.Basic


def index_symbol(dim: int) -> sympy.Symbol:
    """The index along dimension `dim` of the tensor at hand: an integer >= 0."""
    return sympy.Symbol(f"i{dim}", integer=True, nonnegative=True)


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression (a SymInt keeps the program's own symbol)."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape_of(node: fx.Node) -> list[sympy.Expr]:
    """The sizes of the node's tensor value; comparing them adds no guard to the program."""
    return [size_expression(s) for s in node.meta["val"].shape]


def element(node: Any) -> Expression | None:
    """The element of `node` at index (i0, i1, ...), or None where it isn't known for certain.

    node: a graph node with a tensor, SymInt or number as value, or a plain number.
    """
    if isinstance(node, bool):
        return sympy.true if node else sympy.false
    if isinstance(node, int | float):
        return sympy.sympify(node)
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val")
    if isinstance(value, int | torch.SymInt):
        return size_expression(value)
    if node.op != "call_function":
        return None
    handler = _HANDLERS.get(getattr(node.target, "overloadpacket", None))
    return handler(node) if handler else None


def _reindex(node: fx.Node, source: Any, index: dict[int, Expression]) -> Expression | None:
    """element(source) with its index symbols replaced: dimension d is read at index[d]."""
    inner = element(source)
    if inner is None:
        return None
    return inner.subs({index_symbol(d): e for d, e in index.items()}, simultaneous=True)


def _broadcast(node: fx.Node, operand: Any) -> Expression | None:
    """`operand` aligned to the dimensions of `node`, as broadcasting reads it."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return element(operand)
    shape = shape_of(operand)
    lead = node.meta["val"].dim() - len(shape)
    return _reindex(
        node,
        operand,
        {d: sympy.Integer(0) if s == 1 else index_symbol(d + lead) for d, s in enumerate(shape)},
    )


def _number(e: Expression) -> Expression:
    """A boolean read as 0 or 1."""
    return {sympy.true: sympy.Integer(1), sympy.false: sympy.Integer(0)}.get(e, e)


def _elementwise(combine: Callable[..., Expression]) -> Callable[[fx.Node], Expression | None]:
    def handler(node: fx.Node) -> Expression | None:
        if node.kwargs.get("alpha", 1) != 1:
            return None
        operands = [_broadcast(node, a) for a in node.args]
        return None if any(o is None for o in operands) else combine(*operands)

    return handler


def _arithmetic(combine: Callable[..., Expression]) -> Callable[[fx.Node], Expression | None]:
    return _elementwise(lambda *xs: combine(*map(_number, xs)))


def _constant(value: Expression) -> Callable[[fx.Node], Expression]:
    return lambda node: value


def _arange(node: fx.Node) -> Expression | None:
    args = [element(a) for a in node.args]
    if any(a is None for a in args) or node.meta["val"].is_floating_point():
        return None
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    return start + step * index_symbol(0)


def _same(node: fx.Node) -> Expression | None:
    """A cast between integers and booleans, a copy, an alias."""
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    inner = element(node.args[0])
    if inner is None or after.is_floating_point:
        return None
    if after == torch.bool and before != torch.bool:
        return sympy.Ne(_number(inner), 0)
    return inner


def _unsqueeze(node: fx.Node) -> Expression | None:
    rank = node.meta["val"].dim()
    at = node.args[1] % rank
    return _reindex(
        node, node.args[0], {d - (d > at): index_symbol(d) for d in range(rank) if d != at}
    )


def _expand(node: fx.Node) -> Expression | None:
    return _broadcast(node, node.args[0])


def _transpose(node: fx.Node) -> Expression | None:
    rank = node.meta["val"].dim()
    a, b = (d % rank for d in node.args[1:3])
    return _reindex(node, node.args[0], {a: index_symbol(b), b: index_symbol(a)})


def _slice(node: fx.Node) -> Expression | None:
    source, dim, start, _, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    start = element(0 if start is None else start)
    if start is None or not start.is_nonnegative:
        return None
    dim %= node.meta["val"].dim()
    return _reindex(node, source, {dim: start + step * index_symbol(dim)})


def _diff(node: fx.Node) -> Expression | None:
    source, n, dim, prepend = (*node.args, *(1, -1, None)[len(node.args) - 1 :])[:4]
    inner, before = element(source), element(prepend)
    if n != 1 or inner is None or before is None or len(node.args) > 4:
        return None
    i = index_symbol(dim % node.meta["val"].dim())
    if sympy.simplify(inner.subs(i, -1) - before) != 0 or shape_of(prepend)[dim] != 1:
        return None
    return sympy.expand(inner - inner.subs(i, i - 1))


def _cumsum(node: fx.Node) -> Expression | None:
    inner = element(node.args[0])
    if inner is None or _number(inner).free_symbols or not _number(inner).is_number:
        return None
    return _number(inner) * (index_symbol(node.args[1] % node.meta["val"].dim()) + 1)


def _index(node: fx.Node) -> Expression | None:
    source, indices = node.args
    if len(indices) != source.meta["val"].dim() or any(i is None for i in indices):
        return None
    at = [_broadcast(node, i) for i in indices]
    if any(a is None for a in at):
        return None
    return _reindex(node, source, dict(enumerate(at)))


def _triangle(keep: Callable[[Expression, Expression], Expression]) -> Callable:
    def handler(node: fx.Node) -> Expression | None:
        rank = node.meta["val"].dim()
        inner = element(node.args[0])
        diagonal = element(node.args[1] if len(node.args) > 1 else 0)
        if inner is None or diagonal is None or node.meta["val"].dtype != torch.bool:
            return None
        return sympy.And(inner, keep(index_symbol(rank - 1), index_symbol(rank - 2) + diagonal))

    return handler


_HANDLERS: dict[Any, Callable[[fx.Node], Expression | None]] = {
    aten.arange: _arange,
    aten.zeros: _constant(sympy.Integer(0)),
    aten.ones: lambda n: sympy.true if n.meta["val"].dtype == torch.bool else sympy.Integer(1),
    aten.new_zeros: _constant(sympy.Integer(0)),
    aten.new_ones: lambda n: sympy.true if n.meta["val"].dtype == torch.bool else sympy.Integer(1),
    aten.full: lambda n: element(n.args[1]),
    aten.add: _arithmetic(lambda a, b: a + b),
    aten.sub: _arithmetic(lambda a, b: a - b),
    aten.mul: _arithmetic(lambda a, b: a * b),
    aten.le: _arithmetic(sympy.Le),
    aten.lt: _arithmetic(sympy.Lt),
    aten.ge: _arithmetic(sympy.Ge),
    aten.gt: _arithmetic(sympy.Gt),
    aten.eq: _arithmetic(sympy.Eq),
    aten.ne: _arithmetic(sympy.Ne),
    aten.__and__: _elementwise(sympy.And),
    aten.bitwise_and: _elementwise(sympy.And),
    aten.logical_and: _elementwise(sympy.And),
    aten.__or__: _elementwise(sympy.Or),
    aten.bitwise_or: _elementwise(sympy.Or),
    aten.logical_or: _elementwise(sympy.Or),
    aten.logical_not: _elementwise(sympy.Not),
    aten.bitwise_not: _elementwise(sympy.Not),
    aten.to: _same,
    aten._to_copy: _same,
    aten.contiguous: _same,
    aten.clone: _same,
    aten.unsqueeze: _unsqueeze,
    aten.expand: _expand,
    aten.transpose: _transpose,
    aten.slice: _slice,
    aten.diff: _diff,
    aten.cumsum: _cumsum,
    aten.index: _index,
    aten.tril: _triangle(sympy.Le),
    aten.triu: _triangle(sympy.Ge),
}
