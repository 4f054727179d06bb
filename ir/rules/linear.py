"""Rules that make a product with a constant matrix one `linear(x, W, b)`, W [N,K] or its transpose.

Equal in real arithmetic. Source of the spellings: transformers' Conv1D, hand-written layers.
"""

import torch
from torch import fx

from ridgeline.ir.layout import keep_layout
from ridgeline.ir.program import WEIGHT
from ridgeline.ir.rules.common import Rule, insert, reads_changed_memory
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.mT.default, aten.permute.default)


def _is_constant(node: fx.Node) -> bool:
    """Is the value a weight of the model, held by the graph or given to it?"""
    return node.op == "get_attr" or WEIGHT in node.meta


def _weight(node: fx.Node, before: fx.Node) -> fx.Node | None:
    """W [N,K] of a right operand W.T [K,N] that is a constant matrix; None for any other."""
    matrix = shape_of(node)[-2:]
    while node.target is aten.expand.default or node.target is aten.unsqueeze.default:
        node = node.args[0]  # the same matrix for every element of the batch
    if shape_of(node) != matrix:
        return None
    if node.target in _TRANSPOSES and _is_constant(node.args[0]):
        return node.args[0]
    return insert(before, aten.t.default, node) if _is_constant(node) else None


def _linear_from_matmul(node: fx.Node) -> bool:
    """x @ W.T -> linear(x, W)."""
    if node.target is not aten.matmul.default:
        return False
    x, operand = node.args
    if x.meta["val"].dim() < max(2, operand.meta["val"].dim()):
        return False
    weight = _weight(operand, node)
    if weight is None:
        return False
    node.target, node.args = aten.linear.default, (x, weight)
    return True


def _linear_from_addmm(node: fx.Node) -> bool:
    """addmm(b, x, W.T) -> linear(x, W, b)."""
    if node.target is not aten.addmm.default or node.kwargs:
        return False
    bias, x, operand = node.args
    weight = _weight(operand, node) if bias.meta["val"].dim() == 1 else None
    if weight is None or shape_of(bias) != shape_of(node)[-1:]:
        return False
    node.target, node.args = aten.linear.default, (x, weight, bias)
    return True


def _linear_from_inner(node: fx.Node) -> bool:
    """inner(x, W) and tensordot(x, W, last, 1) -> linear(x, W); tensordot(x, W.T, last, 0)."""
    if node.target not in (aten.inner.default, aten.tensordot.default) or node.kwargs:
        return False
    x, weight, *dims = node.args
    if not _is_constant(weight) or weight.meta["val"].dim() != 2:
        return False
    summed, rank = 1, x.meta["val"].dim()
    if rank == 0:
        return False
    if dims:
        if [len(d) for d in dims] != [1, 1]:
            return False
        (mine,), (summed,) = dims
        if mine % rank != rank - 1:
            return False
    if summed % 2 == 0:
        weight = insert(node, aten.t.default, weight)
    node.target, node.args = aten.linear.default, (x, weight)
    return True


def _linear_turned_back(node: fx.Node) -> bool:
    """(W @ x.mT).mT and conv1d(x.mT, W[..., None], b).mT -> linear(x, W, b)."""
    product = _untransposed(node)
    if product is None or len(product.users) > 1 or reads_changed_memory(node):
        return False
    bias = ()
    if product.target is aten.matmul.default:
        weight, turned = product.args
    elif product.target is aten.conv1d.default and not product.kwargs:
        turned, kernel, *rest = product.args  # bias, stride, padding, dilation, groups
        if rest[1:] != [[1], [0], [1], 1][: len(rest[1:])]:
            return False
        bias = tuple(b for b in rest[:1] if b is not None)
        one = kernel.target is aten.unsqueeze.default and shape_of(kernel)[-1] == 1
        weight = kernel.args[0] if one else kernel
    else:
        return False
    x = _untransposed(turned)
    if x is None or not _is_constant(weight) or weight.meta["val"].dim() != 2:
        return False
    linear = insert(node, aten.linear.default, x, weight, *bias)
    node.replace_all_uses_with(linear)
    keep_layout(linear, node)
    node.graph.erase_node(node)
    return True


def _untransposed(node: fx.Node) -> fx.Node | None:
    """x of a transpose of x's last two dimensions."""
    rank = node.meta["val"].dim() if node.target is aten.transpose.int else 0
    return node.args[0] if rank and sorted(node.args[1:]) == [rank - 2, rank - 1] else None


def _bias_into_linear(node: fx.Node) -> bool:
    """linear(x, W) + b -> linear(x, W, b), for a constant b."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    for linear, bias in (node.args, node.args[::-1]):
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        fits = isinstance(bias, fx.Node) and _is_constant(bias)
        if not fits or len(linear.args) != 2 or len(linear.users) != 1:
            continue
        same = linear.meta["val"].dtype == node.meta["val"].dtype == bias.meta["val"].dtype
        if same and shape_of(bias) == shape_of(linear)[-1:]:
            node.target, node.args = aten.linear.default, (*linear.args, bias)
            return True
    return False


def _linear_without_views(node: fx.Node) -> bool:
    """view(linear(view(x, [-1, K]), W), [..., N]) -> linear(x, W)."""
    linear = node.args[0] if node.target in _VIEWS else None
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
        return False
    flat, *rest = linear.args
    if flat.target not in _VIEWS or len(linear.users) != 1:
        return False
    x = flat.args[0]
    if shape_of(x)[-1] != shape_of(flat)[-1]:
        return False
    if shape_of(node) != [*shape_of(x)[:-1], shape_of(linear)[-1]] or reads_changed_memory(linear):
        return False
    node.target, node.args = aten.linear.default, (x, *rest)
    return True


LINEAR: tuple[Rule, ...] = (
    _linear_from_matmul,
    _linear_from_addmm,
    _linear_from_inner,
    _linear_turned_back,
    _bias_into_linear,
    _linear_without_views,
)
