"""Finds x * cos + rotate(x) * sin, `rotate` a quarter turn of x[l:n], which cos multiplies.

See `ridgeline.passes.rotation` for what proves the turn, and `rotary_apart` for the spellings that
have no rotated tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ridgeline.ir.aliases import mutates
from ridgeline.ir.match import Reject
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.dataflow import cast_back, is_floating, last_dim, orders, through_casts
from ridgeline.passes.rotary_apart import Apart, apart_of
from ridgeline.passes.rotation import Place, Rotation, place_of, rotation_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One turned tensor. x: [B,H,S,D] or, where heads is 2, [B,S,H,D]; nodes: its interior.

    angles: how cos and sin come, "each feature", "each pair", or "complex", as one tensor for each
    pair.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    heads: int
    interleaved: bool
    angles: str
    out: fx.Node
    nodes: frozenset[fx.Node]

    @property
    def shared(self) -> tuple[object, ...]:
        """What two turned tensors must have in common to be turned in one call."""
        angles = self.cos, self.sin
        if self.cos.target is aten.complex.default and not mutates(self.cos.graph):
            angles = self.cos.args  # two factors made of the same parts
        return *angles, self.heads, self.interleaved, self.angles


def find_turns(graph: fx.Graph) -> tuple[list[Turn], list[Reject]]:
    """Every turned tensor of the graph, in its order, and the near misses."""
    turns: list[Turn] = []
    misses: list[Reject] = []
    for node in graph.nodes:
        if not is_floating(node):
            continue
        answer = _turn(node) if node.target in _SUMS else _apart(node)
        if isinstance(answer, Turn):
            turns.append(answer)
        elif answer is not None:
            misses.append(answer)
    return turns, misses


_SUMS = (aten.add.Tensor, aten.addcmul.default)


def _apart(node: fx.Node) -> Turn | Reject | None:
    found = apart_of(node)
    if not isinstance(found, Apart):
        return found
    angles = "complex" if found.cos is found.sin else "each pair"
    inside = set(found.nodes)
    return _finish(node, found.place, found.cos, found.sin, found.interleaved, angles, inside)


def _turn(node: fx.Node) -> Turn | Reject | None:
    near: Reject | None = None
    for plain, turned, inside in _products(node):
        for rotated, sin in (turned, turned[::-1]):
            rotation = rotation_of(rotated)
            if isinstance(rotation, Reject):
                near = rotation
            if not isinstance(rotation, Rotation):
                continue
            for x, cos in (plain, plain[::-1]):
                place = place_of(x)
                if place is None or not place.same(rotation.place):
                    continue
                if not (is_floating(cos) and is_floating(sin)):
                    continue
                here = inside | rotation.nodes
                through_casts(x, here)
                answer = _finish(node, place, cos, sin, rotation.interleaved, "each feature", here)
                if isinstance(answer, Turn):
                    return answer
                near = near or answer
    return near


Factors = tuple[object, object]


def _products(node: fx.Node) -> Iterator[tuple[Factors, Factors, set[fx.Node]]]:
    """A sum of two products, in both orders, with its nodes; addcmul(s, a, b) is s + a b."""
    if node.kwargs:  # a sum with alpha
        return
    if node.target is aten.addcmul.default:
        inside = {node}
        plain = through_casts(node.args[0], inside)
        if isinstance(plain, fx.Node) and plain.target is aten.mul.Tensor:
            yield plain.args, node.args[1:], inside | {plain}
        return
    for pair in orders(node):
        inside = {node}
        plain, turned = (through_casts(term, inside) for term in pair)
        if all(isinstance(p, fx.Node) and p.target is aten.mul.Tensor for p in (plain, turned)):
            yield plain.args, turned.args, inside | {plain, turned}


def _finish(
    node: fx.Node,
    place: Place,
    cos: fx.Node,
    sin: fx.Node,
    interleaved: bool,
    angles: str,
    inside: set[fx.Node],
) -> Turn | Reject | None:
    """The turn with its untouched features and its dtype, and the layout that cos and sin show."""
    whole = _whole(cast_back(node, place.root, inside), place, inside)
    if whole is None:
        return None
    x, out = whole[0], cast_back(whole[1], whole[0], inside)
    if shape_of(out) != shape_of(x):  # cos or sin has a dimension that x has not
        return None
    if x.meta["val"].dim() != 4:
        return Reject(
            f"{said(x)} has {x.meta['val'].dim()} dimensions; the kernel reads"
            " [batch, heads, length, features]",
            node,
            "reshape the query to four dimensions",
        )
    width = (place.end - place.start) / (1 if angles == "each feature" else 2)
    heads = _heads(x, cos, width)
    if heads is None or heads != _heads(x, sin, width):
        return Reject(
            f"cos {shape_of(cos)} and sin {shape_of(sin)} are no values per position of {said(x)},"
            f" {shape_of(x)}",
            node,
            "give cos and sin one value per position and feature, the same for all heads",
        )
    return Turn(x, cos, sin, heads, interleaved, angles, out, frozenset(inside - {x, cos, sin}))


def _whole(node: fx.Node, place: Place, inside: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(x, result): with the features that are only copied, where a cat puts them behind; None where
    no value of the program holds what is turned and no more."""
    inside |= {n for n in place.chain[:-1] if n is not place.root}
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.cat.default:
        joined = users[0]
        parts, dim = (*joined.args, 0)[:2]
        rest = (
            place_of(parts[1])
            if len(parts) == 2 and parts[0] is node and last_dim(joined, dim)
            else None
        )
        if rest is not None and rest.root is place.root and rest.start == place.end:
            for candidate in rest.chain[1:]:
                whole = place_of(candidate)
                if whole and whole.start == place.start and whole.end == rest.end:
                    inside |= {joined, parts[1]}
                    inside -= set(rest.chain[rest.chain.index(candidate) :])
                    return candidate, joined
    wholes = (n for n in place.chain if (p := place_of(n)) is not None and p.same(place))
    x = next(wholes, None)
    if x is None:
        return None
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
