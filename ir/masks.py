"""What a mask keeps, proven from the graph that builds it.

A boolean mask M[..., i, j] is a conjunction of atoms. An atom that holds for every index is
dropped; one of the form j <= i + d with d free of the index is the causal triangle with that
diagonal (`torch.tril`'s convention); any other atom stays a mask. An additive mask
``where(M, 0, fill)`` keeps what M keeps when `fill` removes a score entirely.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ridgeline.ir.aliases import writes
from ridgeline.ir.symbolic import element, index_symbol, shape_of

aten = torch.ops.aten
_AND = (aten.__and__, aten.bitwise_and, aten.logical_and)

# Any fp32 score is far below this in magnitude, so score + fill == fill after rounding, and the
# softmax weight of such an entry is exactly 0 beside any kept one.
ABSORBING = -1e30


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask split into what is proven and what is left.

    diagonal: keep j <= i + diagonal (a sympy expression over sizes), or None.
    rest: the node that must still be applied, or None when nothing is left.
    """

    diagonal: sympy.Expr | None
    rest: fx.Node | None


def analyse(node: fx.Node | None) -> Mask:
    """Split a boolean or additive mask node; unknown nodes come back whole as `rest`."""
    if node is None:
        return Mask(None, None)
    if node.meta["val"].dtype == torch.bool:
        return _boolean(node)
    condition = _kept_by_addition(node)
    if condition is not None:
        proven = _boolean(condition)
        # With a triangle alone every row keeps column 0 (diagonal >= 0), so `fill` and
        # exclusion agree; beside an unproven rest a row might lose every column, where they differ.
        if proven.rest is None and (proven.diagonal is None or proven.diagonal.is_nonnegative):
            return proven
    return Mask(None, node)


def closed_beyond(node: fx.Node, base: sympy.Expr) -> str:
    """Why a row i of a mask might let keys beyond i + base be read; "" where it is proven that
    none does, and that the other keys' weights do not depend on how many those are.

    An additive fill that is a number takes all keys alike in a row that keeps none, so of such a
    mask it must be proven too that each row keeps one.
    """
    condition, finite = node, False
    if node.meta["val"].dtype != torch.bool:
        kept = _kept_by_addition(node)
        if kept is None:
            return f"adds '{node.name}' to the scores, which is not known to exclude keys"
        condition = kept
        fill = scalar_value(through_views(node).args[2])
        finite = fill is not None and math.isfinite(fill)
    atoms = list(_atoms(condition))
    found = (_diagonal(a, leaf.meta["val"].dim()) for a, leaf in atoms if a is not None)
    closing = [d for d in found if d is not None and sympy.expand(base - d).is_nonnegative]
    if not closing:
        return f"has a mask, '{node.name}', that is not known to be causal"
    if finite:
        kept = all(a is not None and _kept_at(a, closing[0], leaf) for a, leaf in atoms)
        if not (kept and closing[0].is_nonnegative):
            return (
                f"adds '{node.name}', a number where keys are excluded, and a row may keep none:"
                " such rows read all keys alike"
            )
    return ""


def _kept_at(atom: sympy.Basic, diagonal: sympy.Expr, leaf: fx.Node) -> bool:
    """Does the atom hold for j = i + diagonal in every row?"""
    rank = leaf.meta["val"].dim()
    row = index_symbol(rank - 2)
    return _always(atom.subs({index_symbol(rank - 1): row + diagonal}), leaf)


def _atoms(node: fx.Node) -> Iterator[tuple[sympy.Basic | None, fx.Node]]:
    """What a boolean mask is the conjunction of, None for what is unknown, and whose indices it is
    in."""
    inner = through_views(node)
    if getattr(inner.target, "overloadpacket", None) in _AND and not writes(inner):
        for operand in inner.args:
            yield from _atoms(operand)  # pyright: ignore[reportArgumentType]
        return
    known = element(node)
    # A dimension of size 1 is read at index 0 wherever it is broadcast to.
    single = {index_symbol(d): 0 for d, size in enumerate(shape_of(node)) if size == 1}
    for atom in (None,) if known is None else sympy.And.make_args(known.subs(single)):
        yield atom, node


def _kept_by_addition(node: fx.Node) -> fx.Node | None:
    """M of ``where(M, 0, fill)`` with an absorbing fill."""
    node = through_views(node)
    wheres = (aten.where.ScalarOther, aten.where.self, aten.where.Scalar)
    if node.target not in wheres or writes(node):
        return None
    condition, kept, fill = node.args
    kept, fill = scalar_value(kept), scalar_value(fill)
    if kept == 0 and fill is not None and fill <= ABSORBING:
        return condition
    return None


_SAME_NUMBER = (aten.detach, aten.lift_fresh_copy, aten.clone, aten.alias, aten.to, aten._to_copy)
_SCALAR_ARITHMETIC = (
    *(aten.sqrt, aten.rsqrt, aten.reciprocal, aten.neg, aten.pow, aten.mul, aten.div, aten.add),
    *(aten.sub, aten.true_divide, aten.full, aten.scalar_tensor, aten.exp, aten.log, aten.abs),
)


def scalar_value(value) -> float | None:
    """The number that a node or a plain number stands for, when it is one for every index."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    number = _constant(value)
    if number is None:
        known = element(value)
        return float(known) if known is not None and known.is_number else None
    return number


def _constant(node: fx.Node) -> float | None:
    """The number of a filled tensor, or of arithmetic on constants of no dimensions."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or writes(node):
        return None
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.full, aten.scalar_tensor, aten.full_like, aten.new_full):
        number = node.args[-1]
        return _as_held(number, node) if isinstance(number, int | float) else None
    if node.meta["val"].numel() != 1 or node.meta["val"].dim() > 1:
        return None
    if node.op == "get_attr":
        # A number in the model's code, lifted out of it; a buffer may be changed at any time.
        if not node.meta.get("lifted"):
            return None
        return float(operator.attrgetter(str(node.target))(node.graph.owning_module).item())
    if packet in _SAME_NUMBER:
        number = _constant(node.args[0])
        return None if number is None else _as_held(number, node)
    if packet is None or packet not in _SCALAR_ARITHMETIC or node.kwargs:
        return None
    operands = [_constant(a) if isinstance(a, fx.Node) else a for a in node.args]
    if not all(isinstance(o, int | float) for o in operands):
        return None
    exact = float(packet(*(torch.tensor(o, dtype=torch.float64) for o in operands)))
    return exact if _holds(exact, node, operands) else None


def _holds(exact: float, node: fx.Node, operands: list[Any]) -> bool:
    """Is it what the model computes, but for rounding: nothing wraps and nothing overflows?"""
    given = [
        torch.tensor(o, dtype=a.meta["val"].dtype) if isinstance(a, fx.Node) else o
        for a, o in zip(node.args, operands, strict=True)
    ]
    held = float(node.target(*given))  # pyright: ignore[reportCallIssue]
    dtype = node.meta["val"].dtype
    slack = 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return math.isclose(held, exact, rel_tol=slack) or (math.isnan(held) and math.isnan(exact))


def _as_held(number: float, node: fx.Node) -> float:
    """The number as a tensor of the node's dtype holds it."""
    return float(torch.tensor(number).to(node.meta["val"].dtype).item())


def through_views(node: fx.Node) -> fx.Node:
    """The node behind full slices, expands and copies that change no value."""
    same = (aten.expand.default, aten.contiguous.default, aten.clone.default)
    while node.target in same and not writes(node):
        node = node.args[0]
    return node


def _boolean(node: fx.Node) -> Mask:
    inner = through_views(node)
    if getattr(inner.target, "overloadpacket", None) in _AND and not writes(inner):
        left, right = (_boolean(a) for a in inner.args)
        return _both(node, left, right)
    known = element(node)
    if known is None:
        return Mask(None, node)
    # A dimension of size 1 is read at index 0 wherever it is broadcast to.
    single = {index_symbol(d): 0 for d, size in enumerate(shape_of(node)) if size == 1}
    known = known.subs(single)
    atoms = [a for a in sympy.And.make_args(known) if not _always(a, node)]
    if not atoms:
        return Mask(None, None)
    diagonal = _diagonal(atoms[0], node.meta["val"].dim()) if len(atoms) == 1 else None
    return Mask(diagonal, None if diagonal is not None else node)


def _both(node: fx.Node, left: Mask, right: Mask) -> Mask:
    """The conjunction of two analysed masks; two triangles or two rests stay one mask."""
    two_triangles = left.diagonal is not None and right.diagonal is not None
    two_rests = left.rest is not None and right.rest is not None
    if two_triangles or two_rests:
        return Mask(None, node)
    diagonal = left.diagonal if left.diagonal is not None else right.diagonal
    return Mask(diagonal, left.rest or right.rest)


def _slack(atom: sympy.Basic) -> sympy.Expr | None:
    """e such that the atom says e >= 0 (over integers), or None."""
    if isinstance(atom, sympy.LessThan | sympy.GreaterThan):
        return sympy.expand(atom.gts - atom.lts)
    if isinstance(atom, sympy.StrictLessThan | sympy.StrictGreaterThan):
        return sympy.expand(atom.gts - atom.lts - 1)
    return None


def _always(atom: sympy.Basic, node: fx.Node) -> bool:
    """Does the atom hold at every index within the node's shape?"""
    if atom == sympy.true:
        return True
    worst = _slack(atom)
    if worst is None:
        return False
    for dim, size in enumerate(shape_of(node)):
        i = index_symbol(dim)
        slope = worst.coeff(i)
        if not slope.is_number or (worst - slope * i).expand().has(i):
            return False
        worst = worst.subs(i, 0 if slope.is_nonnegative else size - 1)
    return bool(sympy.expand(worst).is_nonnegative)


def _diagonal(atom: sympy.Basic, rank: int) -> sympy.Expr | None:
    """d when the atom says j <= i + d, with i, j the last two indices and d free of any index."""
    slack = _slack(atom)
    if slack is None or rank < 2:
        return None
    diagonal = sympy.expand(slack - index_symbol(rank - 2) + index_symbol(rank - 1))
    indices = {index_symbol(d) for d in range(rank)}
    return None if diagonal.free_symbols & indices else diagonal
