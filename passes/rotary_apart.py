"""Finds a quarter turn that is spelt without a rotated tensor, with one angle for each pair.

    half-split    cat(a c - b s, b c + a s)               a, b the halves of x[l:n]
    interleaved   flatten(stack(a c - b s, b c + a s))    a, b = x[l:n:2], x[l+1:n:2]
    complex       flatten(view_as_real(z w))              z the pairs (a, b) of x, w = c + i s

Sources: gpt-oss (halves), GPT-J (neighbours), Llama as published (complex).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ridgeline.ir.match import Reject
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.dataflow import VIEWS, is_floating, orders, through_casts
from ridgeline.passes.rotation import (
    FLATTENS,
    Place,
    halves,
    joined_parts,
    neighbours,
    place_of,
)

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Apart:
    """x[l:n] turned by cos and sin, or by both as one complex tensor; nodes: its interior."""

    place: Place
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    nodes: frozenset[fx.Node]


def apart_of(node: fx.Node) -> Apart | Reject | None:
    """What `node` turns; a refusal where it nearly is a turn; None where it is nothing of the
    kind."""
    return _complex(node) or _real(node)


def _real(node: fx.Node) -> Apart | Reject | None:
    inside = {node}
    joined = joined_parts(node, inside)
    if joined is None:
        return None
    parts, interleaved = joined
    first, second = (through_casts(part, inside) for part in parts)
    if _target(first) is not aten.sub.Tensor or _target(second) is not aten.add.Tensor:
        return None
    if first.kwargs or second.kwargs:  # alpha
        return None
    for terms in orders(second):
        products = [through_casts(term, inside) for term in (*first.args, *terms)]
        if any(_target(product) is not aten.mul.Tensor for product in products):
            return None
        for a, b, cos, sin in _factors(*products):
            pieces = [through_casts(piece, inside) for piece in (b, a)]
            place = (neighbours if interleaved else halves)(pieces, inside)
            if isinstance(place, Reject):
                return place
            if place is not None and is_floating(cos) and is_floating(sin):
                inside |= {first, second, *products}
                return Apart(place, cos, sin, interleaved, frozenset(inside))
    return None


def _factors(
    ac: fx.Node, bs: fx.Node, bc: fx.Node, a_s: fx.Node
) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """(a, b, c, s), in each way in which the four products are a c, b s, b c and a s."""
    for a, c in orders(ac):
        for b, s in orders(bs):
            if {*bc.args} == {b, c} and {*a_s.args} == {a, s} and len({a, b, c, s}) == 4:
                yield a, b, c, s


def _complex(node: fx.Node) -> Apart | Reject | None:
    real = node.args[0] if node.target in FLATTENS else None
    if not isinstance(real, fx.Node) or real.target is not aten.view_as_real.default:
        return None
    product = real.args[0]
    sizes = shape_of(real)
    if _target(product) is not aten.mul.Tensor or shape_of(node) != [*sizes[:-2], 2 * sizes[-2]]:
        return None
    near: Reject | None = None
    for z, angle in orders(product):
        inside = {node, real, product}
        place = _pairs(z, inside)
        if isinstance(place, Reject):
            near = place
        elif place is not None and isinstance(angle, fx.Node) and _is_complex(angle):
            return Apart(place, angle, angle, True, frozenset(inside))
    return near


def _pairs(z: object, inside: set[fx.Node]) -> Place | Reject | None:
    """The features that are real and imaginary part of z by turns."""
    if not isinstance(z, fx.Node):
        return None
    if z.target is aten.complex.default:
        inside.add(z)
        return neighbours([through_casts(part, inside) for part in z.args[::-1]], inside)
    if z.target is not aten.view_as_complex.default:
        return None
    inside.add(z)
    viewed = through_casts(z.args[0], inside)
    if not isinstance(viewed, fx.Node) or viewed.target not in VIEWS:
        return None
    x, sizes = viewed.args[0], shape_of(viewed)
    assert isinstance(x, fx.Node)
    if shape_of(x) != [*sizes[:-2], 2 * sizes[-2]]:
        return None
    inside.add(viewed)
    x = through_casts(x, inside)
    inside.add(x)
    return place_of(x)


def _target(value: object) -> object:
    return value.target if isinstance(value, fx.Node) else None


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()
