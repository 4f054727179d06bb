"""Finds x * cos + rotate(x) * sin, and proves that `rotate` is a quarter turn.

    half-split    cat(-x[m:n], x[l:m])                        n - m = m - l
    interleaved   flatten(stack(-x[l+1:n:2], x[l:n:2]))

with x[l:n] what cos multiplies. Slices of slices are followed to one tensor, in whichever way they
are written (slice, chunk, split). What looks like it and differs in a bound or in the sign is
reported.
"""

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.dataflow import (
    cast_back,
    interval,
    is_floating,
    last_dim,
    orders,
    through_casts,
)

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One turned tensor. x: [B,H,S,D] or, where heads is 2, [B,S,H,D]; nodes: its interior."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    heads: int
    interleaved: bool
    out: fx.Node
    nodes: frozenset[fx.Node]

    @property
    def shared(self) -> tuple[object, ...]:
        """What two turned tensors must have in common to be turned in one call."""
        return self.cos, self.sin, self.heads, self.interleaved


@dataclass(frozen=True, slots=True)
class _Place:
    """x[..., start:end] of `root`, in which `chain` are the slices on the way, innermost first."""

    root: fx.Node
    start: sympy.Expr
    end: sympy.Expr
    chain: tuple[fx.Node, ...]

    def same(self, other: "_Place") -> bool:
        """Are these the same features of the same tensor?"""
        return self.root is other.root and self.start == other.start and self.end == other.end


def _place(node: object) -> _Place | None:
    chain: list[fx.Node] = []
    seen: set[fx.Node] = set()
    node = through_casts(node, seen)
    first = interval(node)
    if first is None or first[3] != 1 or not isinstance(node, fx.Node):
        return None
    root, start, end, _ = first
    while root is not node:
        chain.append(node)
        node = through_casts(root, seen)
        outer = interval(node)
        if outer is None or outer[3] != 1:
            break
        root, start, end = outer[0], start + outer[1], end + outer[1]
    return _Place(node, start, end, (*chain, node))


@dataclass(frozen=True, slots=True)
class _Rotation:
    place: _Place
    interleaved: bool
    nodes: frozenset[fx.Node]


def _rotation(node: object) -> _Rotation | Reject | None:
    """What `node` rotates; a refusal where it nearly is a rotation; None where it is nothing of
    the kind."""
    inside: set[fx.Node] = set()
    node = through_casts(node, inside)
    if not isinstance(node, fx.Node) or not is_floating(node):
        return None
    inside.add(node)
    joined, interleaved = node, False
    if node.target in (aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        joined, interleaved = node.args[0], True
        if joined.target is not aten.stack.default:
            return None
        inside.add(joined)
    elif node.target is not aten.cat.default:
        return None
    parts = joined.args[0]
    dim = joined.args[1] if len(joined.args) > 1 else 0
    if len(parts) != 2 or not last_dim(joined, dim):
        return None
    pieces, signs = [], []
    for part in parts:
        part = through_casts(part, inside)
        negated = isinstance(part, fx.Node) and part.target is aten.neg.default
        if negated:
            inside.add(part)
            part = through_casts(part.args[0], inside)
        signs.append(negated)
        pieces.append(part)
    if sum(signs) != 1:
        return None
    place = (_neighbours if interleaved else _halves)(pieces, inside)
    if place is None:
        return None
    if isinstance(place, _Place) and not signs[0]:
        place = Reject(
            f"{said(joined)} negates its second part, a turn in the opposite sense",
            joined,
            "rotate as cat(-x2, x1)",
        )
    if isinstance(place, Reject):
        return place
    if interleaved and shape_of(node)[-1] != place.end - place.start:
        return None
    return _Rotation(place, interleaved, frozenset(inside))


def _halves(pieces: list[fx.Node], inside: set[fx.Node]) -> _Place | Reject | None:
    """The whole of which the pieces are second and first half."""
    second, first = (_place(p) for p in pieces)
    if first is None or second is None or first.root is not second.root:
        return None
    inside |= {n for p in pieces for n in (p, *_made_by(p))}
    sizes = first.end - first.start, second.end - second.start
    if second.end == first.start and sizes[0] == sizes[1]:
        return Reject(
            f"{said(pieces[0])} and {said(pieces[1])} are the halves in their own order; a rotation"
            " swaps them",
            pieces[0],
            "rotate as cat(-x2, x1)",
        )
    if first.end != second.start or sizes[0] != sizes[1]:
        return Reject(
            f"features {first.start} to {first.end} and {second.start} to {second.end} are not two"
            " halves that meet",
            pieces[0],
            "slice x in the middle",
        )
    return _Place(first.root, first.start, second.end, ())


def _neighbours(pieces: list[fx.Node], inside: set[fx.Node]) -> _Place | Reject | None:
    """The whole of which the pieces are the odd and the even features."""
    odd, even = (interval(p) for p in pieces)
    if odd is None or even is None or odd[0] is not even[0] or (odd[3], even[3]) != (2, 2):
        return None
    inside |= set(pieces)
    size = shape_of(odd[0])[-1]
    if (odd[1], even[1]) != (1, 0) or not odd[2] == even[2] == size or size % 2 != 0:
        return Reject(
            f"features from {odd[1]} and from {even[1]} on are paired; the pairs are odd, even",
            pieces[0],
            "rotate as stack(-x[..., 1::2], x[..., ::2])",
        )
    whole = _place(odd[0])
    return None if whole is None else _Place(whole.root, whole.start, whole.end, ())


def _made_by(piece: fx.Node) -> tuple[fx.Node, ...]:
    """The chunk or split that a piece is an output of."""
    parts = piece.args[0] if piece.args else None
    many = isinstance(parts, fx.Node) and isinstance(parts.meta.get("val"), list | tuple)
    return (parts,) if many else ()


def find_turns(graph: fx.Graph) -> tuple[list[Turn], list[Reject]]:
    """Every turned tensor of the graph, in its order, and the near misses."""
    turns: list[Turn] = []
    misses: list[Reject] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is aten.add.Tensor and is_floating(node):
            answer = _turn(node)
            if isinstance(answer, Turn):
                turns.append(answer)
            elif answer is not None:
                misses.append(answer)
    return turns, misses


def _turn(node: fx.Node) -> Turn | Reject | None:
    if node.kwargs:  # a sum with alpha
        return None
    near: Reject | None = None
    for first, second in orders(node):
        inside = {node}
        plain, turned = through_casts(first, inside), through_casts(second, inside)
        if not all(isinstance(p, fx.Node) and p.target is aten.mul.Tensor for p in (plain, turned)):
            continue
        inside |= {plain, turned}
        for rotated, sin in orders(turned):
            rotation = _rotation(rotated)
            if isinstance(rotation, Reject):
                near = rotation
            if not isinstance(rotation, _Rotation):
                continue
            for x, cos in orders(plain):
                place = _place(x)
                if place is None or not place.same(rotation.place):
                    continue
                here = inside | rotation.nodes
                through_casts(x, here)
                answer = _finish(node, place, cos, sin, rotation.interleaved, here)
                if isinstance(answer, Turn):
                    return answer
                near = near or answer
    return near


def _finish(
    node: fx.Node,
    place: _Place,
    cos: object,
    sin: object,
    interleaved: bool,
    inside: set[fx.Node],
) -> Turn | Reject | None:
    """The turn with its untouched features and its dtype, and the layout that cos and sin show."""
    if not (is_floating(cos) and is_floating(sin)):
        return None
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    x, out = _whole(node, place, inside)
    out = cast_back(out, x, inside)
    if shape_of(out) != shape_of(x):  # cos or sin has a dimension that x has not
        return None
    if x.meta["val"].dim() != 4:
        return Reject(
            f"{said(x)} has {x.meta['val'].dim()} dimensions; the kernel reads"
            " [batch, heads, length, features]",
            node,
            "reshape the query to four dimensions",
        )
    heads = _heads(x, cos, place.end - place.start)
    if heads is None or heads != _heads(x, sin, place.end - place.start):
        return Reject(
            f"cos {shape_of(cos)} and sin {shape_of(sin)} are no values per position of {said(x)},"
            f" {shape_of(x)}",
            node,
            "give cos and sin one value per position and feature, the same for all heads",
        )
    return Turn(x, cos, sin, heads, interleaved, out, frozenset(inside - {x, cos, sin}))


def _whole(node: fx.Node, place: _Place, inside: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """(x, result): with the features that are only copied, where a cat puts them behind."""
    inside |= {n for n in place.chain[:-1] if n is not place.root}
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.cat.default:
        joined = users[0]
        parts, dim = (*joined.args, 0)[:2]
        rest = (
            _place(parts[1])
            if len(parts) == 2 and parts[0] is node and last_dim(joined, dim)
            else None
        )
        if rest is not None and rest.root is place.root and rest.start == place.end:
            for candidate in rest.chain[1:]:
                whole = _place(candidate)
                if whole and whole.start == place.start and whole.end == rest.end:
                    inside |= {joined, parts[1]}
                    inside -= set(rest.chain[rest.chain.index(candidate) :])
                    return candidate, joined
    x = next(n for n in place.chain if (p := _place(n)) is not None and p.same(place))
    inside -= set(place.chain[place.chain.index(x) :])
    return x, node


def _heads(x: fx.Node, angle: fx.Node, size: sympy.Expr) -> int | None:
    """The dimension of x over which cos or sin repeats: 1, or 2 where x is [B,S,H,D]."""
    sizes, full = shape_of(angle), shape_of(x)
    if len(sizes) > 4 or len(sizes) < 2 or sizes[-1] != size or not size.is_Integer:
        return None
    sizes = [sympy.Integer(1)] * (4 - len(sizes)) + sizes
    if sizes[0] not in (1, full[0]):
        return None
    if sizes[1] == 1 and sizes[2] == full[2]:
        return 1
    return 2 if sizes[1] == full[1] and sizes[2] == 1 else None
