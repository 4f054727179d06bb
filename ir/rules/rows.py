"""Rules that give means, variances and gates over one dimension one spelling.

Equal in real arithmetic: torch rounds a sum, a root or a gate once more where they stand apart.
"""

import operator

import torch
from torch import fx

from ridgeline.ir.rules.common import Rule, constant_factor, insert
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_VARIANCES = {
    aten.std.dim: aten.var.dim,
    aten.std.correction: aten.var.correction,
    aten.var_mean.dim: aten.var.dim,
    aten.var_mean.correction: aten.var.correction,
}


def _square_of_magnitude(node: fx.Node) -> bool:
    """abs(x)² -> x²."""
    if node.target is not aten.pow.Tensor_Scalar or node.args[1] != 2:
        return False
    magnitude = node.args[0]
    if magnitude.target is not aten.abs.default:
        return False
    x = magnitude.args[0]
    if x.meta["val"].dtype != magnitude.meta["val"].dtype:  # of complex numbers
        return False
    node.args = (x, 2)
    return True


def _mean_that_keeps_its_dimension(node: fx.Node) -> bool:
    """unsqueeze(mean(x, dim), dim) -> mean(x, dim, keepdim=True)."""
    mean = node.args[0] if node.target is aten.unsqueeze.default else None
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or len(mean.users) > 1:
        return False
    dims, keeps = mean.args[1], mean.args[2:3] == (True,)
    rank = node.meta["val"].dim()
    if keeps or mean.kwargs or len(dims) != 1 or dims[0] % rank != node.args[1] % rank:
        return False
    node.target, node.args = aten.mean.dim, (mean.args[0], dims, True)
    return True


def _mean_from_sum(node: fx.Node) -> bool:
    """sum(x, dim) / n -> mean(x, dim), n being the size of that dimension."""
    factor = constant_factor(node)
    total = node.args[0] if factor else None
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return False
    x, dims, *_ = total.args
    if total.kwargs or len(dims) != 1 or x.meta["val"].dtype != total.meta["val"].dtype:
        return False
    size = shape_of(x)[dims[0]]
    if not size.is_Integer or factor != 1.0 / int(size):
        return False
    node.target, node.args = aten.mean.dim, total.args
    return True


def _variance_alone(node: fx.Node) -> bool:
    """var_mean(x)[0] -> var(x), var_mean(x)[1] -> mean(x)."""
    if node.target is not operator.getitem:
        return False
    both, index = node.args
    if both.target not in (aten.var_mean.dim, aten.var_mean.correction):
        return False
    if index == 0:
        node.target, node.args, node.kwargs = _VARIANCES[both.target], both.args, both.kwargs
        return True
    names = [argument.name for argument in both.target._schema.arguments]
    given = dict(zip(names, both.args, strict=False)) | both.kwargs
    dims, keeps = given.get("dim"), given.get("keepdim", False)
    node.target, node.args = aten.mean.dim, (given["self"], dims, keeps)
    return True


def _variance_from_deviation(node: fx.Node) -> bool:
    """std(x)² -> var(x)."""
    if node.target is not aten.pow.Tensor_Scalar or node.args[1] != 2:
        return False
    deviation = node.args[0]
    if deviation.target not in (aten.std.dim, aten.std.correction):
        return False
    node.target = _VARIANCES[deviation.target]
    node.args, node.kwargs = deviation.args, deviation.kwargs
    return True


def _gate_from_glu(node: fx.Node) -> bool:
    """glu(x) -> a * sigmoid(b), a and b the halves of x."""
    if node.target is not aten.glu.default:
        return False
    x, dim = node.args[0], node.args[1] if len(node.args) > 1 else -1
    whole = shape_of(x)[dim]
    if not whole.is_Integer:
        return False
    half = int(whole) // 2
    a = insert(node, aten.slice.Tensor, x, dim, 0, half)
    b = insert(node, aten.slice.Tensor, x, dim, half, 2 * half)
    gate = insert(node, aten.sigmoid.default, b)
    node.target, node.args = aten.mul.Tensor, (a, gate)
    return True


ROWS: tuple[Rule, ...] = (
    _square_of_magnitude,
    _mean_that_keeps_its_dimension,
    _mean_from_sum,
    _variance_alone,
    _variance_from_deviation,
    _gate_from_glu,
)
