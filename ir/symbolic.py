"""Tensors as functions of their index: what a mask builder computes, for every size at once.

A node such as ``arange(n)[None, :] <= arange(n)[:, None]`` is read as a sympy expression over the
index symbols i0, i1, ... of its own dimensions and the size symbols of the program. Only what is
certain gets an expression; every other node gives None, and its value stays unknown.
"""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import fx

from ridgeline.ir.aliases import writes

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


def strides_of(node: fx.Node) -> list[sympy.Expr]:
    """The strides of a node's tensor as expressions; 0 where a size of 1 makes them meaningless."""
    strides = map(size_expression, node.meta["val"].stride())
    pairs = zip(shape_of(node), strides, strict=True)
    return [sympy.Integer(0) if size == 1 else sympy.expand(stride) for size, stride in pairs]


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
    known = handler(node) if handler else None
    certain = known is not None and _cannot_wrap(node, known) and not writes(node)
    return known if certain else None


def _cannot_wrap(node: fx.Node, known: Expression) -> bool:
    """Integers of 8 and 16 bits may overflow; conditions (0 or 1) never do."""
    dtype = node.meta["val"].dtype
    wide = dtype.is_floating_point or dtype in (torch.bool, torch.int32, torch.int64)
    return wide or _is_condition(known) or known in (0, 1)


def _is_condition(e: Expression) -> bool:
    """True, false, a comparison or a combination of them; in arithmetic it counts as 1 or 0."""
    return isinstance(e, Relational | BooleanFunction | BooleanAtom)


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
    """Over numbers; a comparison among the operands leaves the result unknown."""

    def on_numbers(*operands: Expression) -> Expression | None:
        numbers = [_number(o) for o in operands]
        return None if any(_is_condition(n) for n in numbers) else combine(*numbers)

    return _elementwise(on_numbers)


def _logical(combine: Callable[..., Expression]) -> Callable[[fx.Node], Expression | None]:
    """Over conditions; the bits of any other integer stay unknown."""

    def on_conditions(*operands: Expression) -> Expression | None:
        return combine(*operands) if all(map(_is_condition, operands)) else None

    return _elementwise(on_conditions)


def _product(a: Expression, b: Expression) -> Expression | None:
    """Of two conditions, their conjunction."""
    if _is_condition(a) and _is_condition(b):
        return sympy.And(a, b)
    a, b = _number(a), _number(b)
    return None if _is_condition(a) or _is_condition(b) else a * b


def _difference(a: Expression, b: Expression) -> Expression | None:
    """1 less a condition is its negation."""
    if _number(a) == 1 and _is_condition(b):
        return sympy.Not(b)
    a, b = _number(a), _number(b)
    return None if _is_condition(a) or _is_condition(b) else a - b


def _equal(a: Expression, b: Expression) -> Expression | None:
    """A condition equals 1 where it holds and 0 where it doesn't."""
    for condition, other in ((a, b), (b, a)):
        if _is_condition(condition) and _number(other) in (0, 1):
            return condition if _number(other) == 1 else sympy.Not(condition)
    return None if _is_condition(a) or _is_condition(b) else sympy.Eq(a, b)


def _unequal(a: Expression, b: Expression) -> Expression | None:
    equal = _equal(a, b)
    return None if equal is None else sympy.Not(equal)


def _filled(value: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Expression | None]:
    """The same number everywhere; of a boolean tensor, true or false."""

    def handler(node: fx.Node) -> Expression | None:
        known, dtype = element(value(node)), node.meta["val"].dtype
        if known is None or _is_condition(known):
            return known
        if dtype != torch.bool:
            if known.is_number and not dtype.is_floating_point:
                return sympy.Integer(int(known))  # 1.7 in a tensor of integers is 1
            return known
        return sympy.Ne(known, 0) if known.is_number else None

    return handler


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
    if inner is None or before.is_floating_point or after.is_floating_point:
        return None
    if after == torch.bool and not _is_condition(inner):
        return sympy.Ne(inner, 0)
    return inner


def _not(node: fx.Node) -> Expression | None:
    """Negation; ~ of an integer flips its bits and stays unknown."""
    inner = element(node.args[0])
    boolean = node.meta["val"].dtype == torch.bool
    return sympy.Not(inner) if boolean and inner is not None and _is_condition(inner) else None


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
    if any(a is None or not a.is_nonnegative for a in at):  # -1 would read from the end
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
    aten.zeros: _filled(lambda n: 0),
    aten.ones: _filled(lambda n: 1),
    aten.new_zeros: _filled(lambda n: 0),
    aten.new_ones: _filled(lambda n: 1),
    aten.full: _filled(lambda n: n.args[1]),
    aten.add: _arithmetic(lambda a, b: a + b),
    aten.sub: _elementwise(_difference),
    aten.rsub: _elementwise(lambda a, b: _difference(b, a)),
    aten.mul: _elementwise(_product),
    aten.le: _arithmetic(sympy.Le),
    aten.lt: _arithmetic(sympy.Lt),
    aten.ge: _arithmetic(sympy.Ge),
    aten.gt: _arithmetic(sympy.Gt),
    aten.eq: _elementwise(_equal),
    aten.ne: _elementwise(_unequal),
    aten.__and__: _logical(sympy.And),
    aten.bitwise_and: _logical(sympy.And),
    aten.logical_and: _logical(sympy.And),
    aten.__or__: _logical(sympy.Or),
    aten.bitwise_or: _logical(sympy.Or),
    aten.logical_or: _logical(sympy.Or),
    aten.logical_not: _not,
    aten.bitwise_not: _not,
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
