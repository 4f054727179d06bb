"""What the rules of the normal form are made of."""

import contextlib
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import sharing, writes, written_between
from ridgeline.ir.masks import scalar_value
from ridgeline.ir.provenance import KEPT

aten = torch.ops.aten
Rule = Callable[[fx.Node], bool]
"""Looks at one node and rewrites it in place, or says no."""

CASTS = (aten.to, aten._to_copy, aten.type_as)
_SCORE_STEPS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self),
    *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar),
    *(aten.masked_fill.Tensor, aten.view.default, aten.reshape.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.cat.default, aten.tanh.default),
    *(aten.maximum.default, aten.max.other),
)


def reads_changed_memory(node: fx.Node) -> bool:
    """May a rule at `node`, which reads up to two steps back, move a read across a write?"""
    near = list(node.all_input_nodes)
    near += [n for i in node.all_input_nodes for n in i.all_input_nodes]
    return written_between(near, node) is not None


def copy_is_unseen(node: fx.Node) -> bool:
    """Neither the copy nor what it copies is ever written, in the program or by its caller."""
    given_out = any(user.op == "output" for value in sharing(node) for user in value.users)
    return not (given_out or writes(node) or writes(node.args[0]))


def is_cast(node: fx.Node) -> bool:
    """A change of floating dtype and nothing else."""
    return (
        getattr(node.target, "overloadpacket", None) in CASTS
        and node.args[0].meta["val"].is_floating_point()
        and node.meta["val"].is_floating_point()
        and node.args[0].meta["val"].device == node.meta["val"].device
    )


def can_hold(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Is every value of the floating dtype `other` one of `dtype` too?"""
    if 1 in (dtype.itemsize, other.itemsize):  # torch promotes no float8
        return dtype == other or (other.itemsize == 1 and dtype not in (torch.float16, other))
    return torch.promote_types(dtype, other) == dtype


def forward(node: fx.Node) -> bool:
    """The node equals its first argument: let its users read that."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
    return True


def insert(node: fx.Node, target, *args, value: torch.Tensor | None = None, **kwargs) -> fx.Node:
    """A new call before `node`, with its provenance; its fake `value` is computed if not given."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in node.meta.items() if k in KEPT}
    if value is None:

        def fake(x):
            return x.meta["val"] if isinstance(x, fx.Node) else x

        with getattr(node.meta["val"], "fake_mode", contextlib.nullcontext()):
            value = target(*fx.node.map_arg(args, fake), **fx.node.map_arg(kwargs, fake))
    new.meta["val"] = value
    return new


def feeds_softmax(node: fx.Node) -> bool:
    """The node has one user, and through score arithmetic that user ends in a softmax."""
    users = list(node.users)
    if len(users) != 1:
        return False
    user = users[0]
    return user.target is aten.softmax.int or (
        (user.target in _SCORE_STEPS or is_cast(user)) and feeds_softmax(user)
    )


def constant_factor(node) -> float | None:
    """c when the node is x * c or x / c with a number c, literal or a constant of no dimensions."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    x, c = node.args
    if node.target is aten.mul.Tensor and isinstance(c, fx.Node) and _dimensionless(x):
        x, c = c, x
    if not is_tensor(x) or x.meta["val"].dtype != node.meta["val"].dtype:
        return None
    if isinstance(c, fx.Node):
        c = scalar_value(c) if _dimensionless(c) else None
    if not isinstance(c, int | float) or c == 0:
        return None
    return float(c) if node.target is aten.mul.Tensor else 1.0 / float(c)


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """Is it a node whose value is a tensor, and not a size?"""
    return isinstance(node, fx.Node) and isinstance(node.meta["val"], Tensor)


def _dimensionless(node: object) -> bool:
    return is_tensor(node) and node.meta["val"].dim() == 0


def packet_of(node: object):
    """The operator that a node calls, whatever its overload; None for what is no such call."""
    return getattr(getattr(node, "target", None), "overloadpacket", None)
