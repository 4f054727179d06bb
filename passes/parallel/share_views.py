"""Where a share lies after its value is seen in another shape, and whether it may be seen so.

    [.., H_r D] -> [.., H_r, D]         heads of D channels; the share is the first factor's
    [.., H_r, D] -> [.., H_r D]         and back
    [B, H_r, T] -> [B H_r, T]           behind B others in its dimension: outer = B
    [.., H_r D] -> [.., D, H_r]         no part of [.., D, H]: an error

That the inner size is the same in one process is known where it is a head's or a group of heads',
or where the model leaves the outer one open (-1); where it leaves the inner one open, it is not.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import sympy
from torch import fx

from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.shares import Across, Share, Shares

Rule = Callable[[fx.Node, Shares], Share | None]
_Place = tuple[int, sympy.Expr, sympy.Expr, sympy.Expr]


def _held(node: fx.Node, shares: Shares) -> Share:
    return shares.held[node.args[0]]


def _reshaped(node: fx.Node, shares: Shares) -> Share:
    share, source = _held(node, shares), shape_of(node.args[0])
    if node.target._overloadname == "dtype":
        return _read_as(node, share)
    own = _quotient(source[share.dim], share.outer)
    before = sympy.prod(source[: share.dim]) * share.outer
    cut = [p for p in _places(before, own, shape_of(node)) if _may_be(p, share, node)]
    if not cut:
        raise Across("sees this rank's part in a shape whose sizes may be others in one process")
    kept = _kept(source, shape_of(node), share.dim)
    cut = [p for p in cut if p[0] == kept and p[2] == 1] or cut
    # A value that gains a dimension is cut, although a rank with one head might see it whole.
    more = len(shape_of(node)) > len(source)
    dim, outer, inner, joined = max(cut, key=lambda p: (more and p[2] != 1, p[0]))
    cuts = {sympy.Integer(c) / inner for c in share.cuts}
    cuts = {int(c * joined) for c in cuts if c.is_Integer and c > 1 and joined.is_Integer}
    if joined != 1 and joined.is_Integer:
        cuts.add(int(joined))
    return replace(share, dim=dim, outer=outer, cuts=frozenset(cuts))


def _kept(source: list[sympy.Expr], shape: list[sympy.Expr], dim: int) -> int | None:
    """Where dimension `dim` is, if those up to it, or from it on, are what they were: a rank's only
    head, of size 1, could be anywhere else."""
    if shape[: dim + 1] == source[: dim + 1]:
        return dim
    place = len(shape) - len(source[dim:])
    joined = [s for s in shape[: max(place, 0)] if s != 1] != [s for s in source[:dim] if s != 1]
    return place if place >= 0 and joined and shape[place:] == source[dim:] else None


def _places(before: sympy.Expr, own: sympy.Expr, shape: list[sympy.Expr]) -> list[_Place]:
    """Dimensions that may hold the share: which, what lies before it there, the indices that its
    own are cut into runs of, and the elements behind them that are joined to each."""
    found: list[_Place] = []
    left: sympy.Expr = sympy.S.One
    for dim, size in enumerate(shape):
        outer = _quotient(before, left)
        held = _quotient(size, outer)
        if _whole(outer) and _whole(held) and (outer == 1 or held != 1):
            inner, joined = _quotient(own, held), _quotient(held, own)
            if _whole(inner):
                found.append((dim, outer, inner, sympy.S.One))
            elif _whole(joined):
                found.append((dim, outer, sympy.S.One, joined))
        left *= size
    return found


def _read_as(node: fx.Node, share: Share) -> Share:
    """x.view(dtype): the same bits, index by index where the dtypes are equally wide."""
    if node.args[0].meta["val"].element_size() != node.meta["val"].element_size():
        raise Across("reads the bits of a part as numbers of another width")
    return replace(share, weight="")


@cache
def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return sympy.cancel(a / b)


def _whole(size: sympy.Expr) -> bool:
    return sympy.fraction(sympy.together(size))[1] == 1


def _may_be(place: _Place, share: Share, node: fx.Node) -> bool:
    dim, _, inner, joined = place
    given = node.args[1] if node.target._opname in ("view", "reshape", "_unsafe_view") else ()
    given = given if len(given) == len(shape_of(node)) else [None] * len(shape_of(node))
    if inner == 1:
        # A dimension more, left open: 1 here, where the rank has one head, may be more elsewhere.
        shape = shape_of(node)
        behind = range(dim + 1, len(shape)) if len(shape) > len(shape_of(node.args[0])) else ()
        open_ = any(given[i] == -1 and shape[i] == 1 for i in behind)
        return (share.packed == 1 or joined == 1) and not open_
    if share.packed != 1:
        return False
    return inner in share.cuts or (not share.cuts and given[dim] == -1)


def _moved(node: fx.Node, shares: Shares) -> Share:
    share, rank = _held(node, shares), len(shape_of(node.args[0]))
    name = node.target._opname
    if name == "permute":
        order = [d % rank for d in node.args[1]]
    else:
        a, b = node.args[1:3] if name == "transpose" else (rank - 1, rank - 2)
        order = list(range(rank))
        if rank > 1:
            order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return share.at(order.index(share.dim))


def _unsqueezed(node: fx.Node, shares: Shares) -> Share:
    share, new = _held(node, shares), node.args[1] % len(shape_of(node))
    return share.at(share.dim + (new <= share.dim))


def _squeezed(node: fx.Node, shares: Shares) -> Share:
    share, shape = _held(node, shares), shape_of(node.args[0])
    named = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    dims = {d % len(shape) for d in (named if isinstance(named, list | tuple) else [named])}
    gone = {d for d in dims if shape[d] == 1}
    if share.dim in gone:
        raise Across("leaves out the dimension where this rank's part is one index")
    return share.at(share.dim - sum(d < share.dim for d in gone))


def _like_another(rule: Callable[[fx.Node, Shares], Share]) -> Rule:
    """Of x.view_as(y) and x.expand_as(y), which read the sizes of y alone."""
    return lambda node, shares: rule(node, shares) if node.args[0] in shares.held else None


def _expanded(node: fx.Node, shares: Shares) -> Share:
    share, shape = _held(node, shares), shape_of(node.args[0])
    dim = share.dim + len(shape_of(node)) - len(shape)
    if shape_of(node)[dim] != shape[share.dim]:
        raise Across("repeats this rank's part")
    return share.at(dim)


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshaped),
    **{"view_as": _like_another(_reshaped), "expand_as": _like_another(_expanded)},
    **dict.fromkeys(("permute", "transpose", "t", "mT"), _moved),
    **{"unsqueeze": _unsqueezed, "squeeze": _squeezed},
    **dict.fromkeys(("expand", "repeat"), _expanded),
}
