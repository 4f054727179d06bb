"""In which order the elements of a tensor lie in memory, and who can tell.

A rewritten value may lie in memory otherwise than what it replaces. Most readers do not see that;
a view does (``x.transpose(1, 2).view(...)`` is legal for some layouts only), and so does the caller
of the program.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.aliases import writes
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import strides_of

aten = torch.ops.aten


def heads_side_by_side(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty [B,H,S,D] with `like`'s dtype and device, in memory [B,S,H,D]: the heads of one
    position lie together, as the projection that reads them wants it."""
    batch, heads, length, dim = shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def keep_layout(node: fx.Node, original: fx.Node) -> fx.Node:
    """The value of `node` laid out as that of `original`, which it stands for, where somebody can
    tell the difference; else `node`. Users of `node` then read the result."""
    if strides_of(node) == strides_of(original) or not _is_seen(node, node.meta["val"]):
        return node
    value = original.meta["val"]
    strides = list(numbers(value.stride()))
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    users, after = list(node.users), node.next
    back = [order.index(d) for d in range(len(order))]
    with node.graph.inserting_before(after):
        ordered = _call(aten.permute.default, node, order)
        dense = _call(aten.contiguous.default, ordered)
        moved = _call(aten.permute.default, dense, back)
    if strides_of(moved) != strides_of(original):  # entries that share memory, or gaps between them
        for each in (moved, dense, ordered):
            node.graph.erase_node(each)
        return node
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user in users)
    return moved


def _call(target: torch._ops.OpOverload, x: fx.Node, *rest: list[int]) -> fx.Node:
    node = x.graph.call_function(target, (x, *rest))
    provenance = {k: v for k, v in x.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta = {**provenance, "val": target(x.meta["val"], *rest)}
    return node


def _is_seen(node: fx.Node, value: Any) -> bool:
    """Can a reader tell that `node` is laid out as `value`: a view that this layout forbids, a
    write through what is a view in one layout and a copy in the other, or the caller; be it of what
    elementwise operations make of it, which is laid out alike?"""
    if writes(node):
        return True
    for user in node.users:
        if user.op == "output" or getattr(user.target, "overloadpacket", None) is aten.as_strided:
            return True
        args, kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda n: value if n is node else n.meta["val"]
        )
        try:
            result = user.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        except (RuntimeError, ValueError):
            return True
        if not _alike(result, user.meta["val"]) and _is_seen(user, result):
            return True
    return False


def _alike(result: Any, expected: Any) -> bool:
    """Do tensors, or all of several, lie in memory the same way?"""
    if isinstance(result, Tensor):
        return result.stride() == expected.stride()
    if isinstance(result, list | tuple):
        return all(map(_alike, result, expected))
    return True
