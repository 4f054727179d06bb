"""Reads off a graph which features of which tensor a value holds, and proves a quarter turn.

    half-split    cat(-x[m:n], x[l:m])                        n - m = m - l
    interleaved   flatten(stack(-x[l+1:n:2], x[l:n:2]))

Slices of slices are followed to one tensor, in whichever way they are written (slice, chunk, split,
unbind of a view). What looks like a rotation and differs in a bound or in the sign is reported.
"""

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.dataflow import (
    VIEWS,
    interval,
    is_floating,
    last_dim,
    negated,
    through_casts,
)

aten = torch.ops.aten
FLATTENS = (aten.flatten.using_ints, aten.reshape.default, aten.view.default)


@dataclass(frozen=True, slots=True)
class Place:
    """x[..., start:end] of `root`, in which `chain` are the slices on the way, innermost first."""

    root: fx.Node
    start: sympy.Expr
    end: sympy.Expr
    chain: tuple[fx.Node, ...]

    def same(self, other: "Place") -> bool:
        """Are these the same features of the same tensor?"""
        return self.root is other.root and self.start == other.start and self.end == other.end


def place_of(node: object) -> Place | None:
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
    return Place(node, start, end, (*chain, node))


@dataclass(frozen=True, slots=True)
class Rotation:
    place: Place
    interleaved: bool
    nodes: frozenset[fx.Node]


def rotation_of(node: object) -> Rotation | Reject | None:
    """What `node` rotates; a refusal where it nearly is a rotation; None where it is nothing of
    the kind."""
    inside: set[fx.Node] = set()
    node = through_casts(node, inside)
    if not isinstance(node, fx.Node) or not is_floating(node):
        return None
    inside.add(node)
    joined = joined_parts(node, inside)
    if joined is None:
        return None
    parts, interleaved = joined
    pieces, signs = [], []
    for part in parts:
        part = through_casts(part, inside)
        turned = negated(part, inside)
        signs.append(turned is not None)
        pieces.append(part if turned is None else turned)
    if sum(signs) != 1:
        return None
    place = (neighbours if interleaved else halves)(pieces, inside)
    if place is None:
        return None
    if isinstance(place, Place) and not signs[0]:
        place = Reject(
            f"{said(node)} negates its second part, a turn in the opposite sense",
            node,
            "rotate as cat(-x2, x1)",
        )
    if isinstance(place, Reject):
        return place
    return Rotation(place, interleaved, frozenset(inside))


def joined_parts(node: fx.Node, inside: set[fx.Node]) -> tuple[list[fx.Node], bool] | None:
    """Two parts and whether the node holds their features by turns, not one behind the other."""
    if node.target is aten.cat.default:
        parts, dim = (*node.args, 0)[:2]
        return (parts, False) if len(parts) == 2 and last_dim(node, dim) else None
    stacked = node.args[0] if node.target in FLATTENS else None
    if not isinstance(stacked, fx.Node) or stacked.target is not aten.stack.default:
        return None
    parts, dim = (*stacked.args, 0)[:2]
    rank, sizes = stacked.meta["val"].dim(), shape_of(stacked)
    if len(parts) != 2 or rank < 2 or dim % rank < rank - 2:
        return None
    if shape_of(node) != [*sizes[:-2], sizes[-2] * sizes[-1]]:
        return None
    inside.add(stacked)
    return parts, dim % rank == rank - 1


def halves(pieces: list[fx.Node], inside: set[fx.Node]) -> Place | Reject | None:
    """The whole of which the pieces are second and first half."""
    second, first = (place_of(p) for p in pieces)
    if first is None or second is None or first.root is not second.root:
        return None
    inside |= {n for p in pieces for n in (p, *_made_by(p), *_casts_before(p))}
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
    common = tuple(node for node in first.chain if node in second.chain)
    return Place(first.root, first.start, second.end, common)


def neighbours(pieces: list[fx.Node], inside: set[fx.Node]) -> Place | Reject | None:
    """The whole of which the pieces are the odd and the even features."""
    odd, even = (interval(p) for p in pieces)
    if odd is None or even is None or odd[0] is not even[0] or (odd[3], even[3]) != (2, 2):
        return None
    inside |= {n for p in pieces for n in (p, *_made_by(p), *_casts_before(p))}
    size = shape_of(odd[0])[-1]
    if (odd[1], even[1]) != (1, 0) or not odd[2] == even[2] == size or size % 2 != 0:
        return Reject(
            f"features from {odd[1]} and from {even[1]} on are paired; the pairs are odd, even",
            pieces[0],
            "rotate as stack(-x[..., 1::2], x[..., ::2])",
        )
    return place_of(odd[0])


def _made_by(piece: fx.Node) -> tuple[fx.Node, ...]:
    """The chunk, split or unbind that a piece is an output of, and the view that is taken apart."""
    chain: list[fx.Node] = []
    node = piece.args[0] if piece.args else None
    while isinstance(node, fx.Node) and (
        isinstance(node.meta.get("val"), list | tuple) or node.target in VIEWS
    ):
        chain.append(node)
        node = node.args[0]
    return tuple(chain)


def _casts_before(piece: fx.Node) -> set[fx.Node]:
    """The casts of what a piece is cut from."""
    casts: set[fx.Node] = set()
    cut = interval(piece)
    if cut is not None and cut[0] is not piece:
        through_casts(cut[0], casts)
    return casts
