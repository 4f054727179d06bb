"""Rules that give attention sinks one spelling: softmax(cat(scores, sinks))[..., :-1] @ value.

A sink is a score that takes part in the softmax and has no value (`ridgeline.ir.attention`), a
column beside the scores whose weight is dropped. Models put it first or last and drop it with an
index, a narrow or the length of the keys; what is left is strided, and often copied for that.
"""

import sympy
import torch
from torch import fx

from ridgeline.ir.aliases import writes
from ridgeline.ir.rules.common import Rule, forward, is_cast
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten


def _sinks_last(node: fx.Node) -> bool:
    """softmax(cat(sinks, scores))[..., 1:] and [..., :Sk] of either order -> [..., :-1]."""
    if node.target is not aten.slice.Tensor:
        return False
    softmax = _alone(node.args[0])
    if softmax is None or softmax.target is not aten.softmax.int or softmax.args[1] != -1:
        return False
    both = _alone(softmax.args[0])
    if both is None or both.target is not aten.cat.default or len(both.args[0]) != 2:
        return False
    last = node.meta["val"].dim() - 1
    along = (*both.args[1:], 0)[0]
    if along % (last + 1) != last or node.args[1] % (last + 1) != last:
        return False
    first = _first_kept(node)
    if first is None:
        return False
    scores, sinks = both.args[0] if first == 0 else reversed(both.args[0])
    if shape_of(sinks)[-1] != 1:
        return False
    before = both.args, node.args
    both.args, node.args = ([scores, sinks], last), (node.args[0], last, 0, -1)
    return before != (both.args, node.args)


def _alone(node: fx.Node) -> fx.Node | None:
    """The value behind casts, where each has one reader."""
    while is_cast(node) and len(node.users) == 1:
        node = node.args[0]
    return node if len(node.users) == 1 else None


def _first_kept(node: fx.Node) -> int | None:
    """0 or 1, where a slice keeps all entries but the last or the first."""
    whole, part = shape_of(node.args[0])[-1], shape_of(node)[-1]
    start, step = (node.args[i] if len(node.args) > i else None for i in (2, 4))
    if step not in (None, 1) or sympy.expand(whole - part) != 1:
        return None
    if start in (None, 0):
        return 0
    return 1 if start == 1 or (isinstance(start, int) and start + whole == 1) else None


def _weights_uncopied(node: fx.Node) -> bool:
    """contiguous(p) @ v and dropout(p, off) @ v -> p @ v, for such a slice p of weights."""
    copies = node.target in (aten.contiguous.default, aten.clone.default)
    off = node.target is aten.dropout.default and (node.args[1] == 0 or node.args[2] is False)
    part = node.args[0] if copies or off else None
    while isinstance(part, fx.Node) and is_cast(part):
        part = part.args[0]
    if not isinstance(part, fx.Node) or part.target is not aten.slice.Tensor:
        return False
    softmax = _alone(part.args[0])
    weights = softmax is not None and softmax.target is aten.softmax.int
    return weights and _multiplied_alone(node) and not writes(part) and forward(node)


def _multiplied_alone(node: fx.Node) -> bool:
    """Do only products of matrices read the value, which take it with any strides?"""
    return all(
        user.target is aten.matmul.default
        or ((is_cast(user) or user.target is aten.transpose.int) and _multiplied_alone(user))
        for user in node.users
    )


SINKS: tuple[Rule, ...] = (_sinks_last, _weights_uncopied)
