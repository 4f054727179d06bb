"""Which operations compute each row of [..., tokens, K] from that row alone.

    f(concat of shards) = concat of f(shard)

holds for elementwise operations, for reductions and norms over the last dimension, and for views
that keep the rows in order. What is row by row commutes with a split of the tokens over ranks.
"""

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ridgeline.ir.normalize import is_cast
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim),
)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_REDUCTIONS = (
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
    *(aten.var.correction, aten.std.correction),
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
NORMS = (aten.rms_norm.default, aten.layer_norm.default, aten.native_layer_norm.default)
_OURS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")


def is_row_wise(node: fx.Node) -> bool:
    """Does the call compute each row of its result from the rows of its operands at that place?"""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.op == "call_function" and is_row_wise(source)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if target in COPIES or is_cast(node) or torch.Tag.pointwise in target.tags:
        return True
    return is_row_reduction(node)


def is_row_reduction(node: fx.Node) -> bool:
    """A norm, a softmax or a reduction that keeps its dimension, over the last dimension alone."""
    target = node.target
    if target in NORMS:
        return len(node.args[1]) == 1
    if getattr(target, "namespace", "") == "ridgeline":
        return target._opname in _OURS
    if target not in (*_SOFTMAX, *_REDUCTIONS):
        return False
    rank = node.args[0].meta["val"].dim()
    if target in _SOFTMAX:
        return node.args[1] in (-1, rank - 1)
    dims = argument(node, 1, "dim")
    return bool(argument(node, 2, "keepdim")) and list(dims or []) in ([-1], [rank - 1])


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument by position or name; None where it is not given."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def row_count(node: fx.Node) -> sympy.Expr | None:
    """How many rows the node's tensor has: the product of all sizes but the last."""
    if not isinstance(node.meta.get("val"), Tensor) or node.meta["val"].dim() < 2:
        return None
    return sympy.prod(shape_of(node)[:-1])


def same_size(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def keeps_rows(before: fx.Node, after: fx.Node) -> bool:
    """Do two tensors that are views of one another have the same rows in the same order?"""
    if not (isinstance(before, fx.Node) and shape_of(before) and shape_of(after)):
        return False
    rows, kept = row_count(before), row_count(after)
    if rows is None or kept is None:
        return False
    return same_size(rows, kept) and same_size(shape_of(before)[-1], shape_of(after)[-1])
