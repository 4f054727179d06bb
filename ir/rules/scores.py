"""Rules that move a factor, a mask or a maximum within attention scores: equal in real arithmetic.

They look only at what feeds or spells a softmax, where no rounding of the moved factor can be seen
beside that of the product itself.
"""

import operator

import torch
from torch import fx

from ridgeline.ir.masks import ABSORBING, scalar_value
from ridgeline.ir.rules.biases import is_product
from ridgeline.ir.rules.common import (
    Rule,
    can_hold,
    constant_factor,
    feeds_softmax,
    forward,
    insert,
    is_cast,
)
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_FLATTEN = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_UNFLATTEN = (aten.view.default, aten.reshape.default, aten.unflatten.int)


def _drop_zero(node: fx.Node) -> bool:
    """scores + 0 -> scores; elsewhere it turns -0 into 0, which a softmax does not tell apart."""
    zero = node.target is aten.add.Tensor and node.args[1] == 0
    same = zero and node.args[0].meta["val"].dtype == node.meta["val"].dtype
    return bool(same) and feeds_softmax(node) and forward(node)


def _scale_by_multiplication(node: fx.Node) -> bool:
    """scores / c and scores * c, c a constant of no dimensions -> scores * number."""
    factor = constant_factor(node)
    if factor is None or not feeds_softmax(node):
        return False
    x, c = node.args
    if node.target is aten.mul.Tensor and not isinstance(c, fx.Node):
        return False
    scores = x if isinstance(x, fx.Node) and x.meta["val"].dim() else c
    node.target, node.args = aten.mul.Tensor, (scores, factor)
    return True


def _hoist_scale(node: fx.Node) -> bool:
    """(q * c) @ k -> (q @ k) * c, and the same on k's side, through its transpose."""
    if node.target is not aten.matmul.default or not feeds_softmax(node):
        return False
    if node.meta["val"].dtype == torch.float16:
        return False  # the scale may be what keeps the product within fp16's range
    for position, operand in enumerate(node.args):
        maker, transposed = operand, False
        if maker.target is aten.transpose.int:
            maker, transposed = maker.args[0], True
        factor = constant_factor(maker)
        if factor is None:
            continue
        bare = maker.args[0] if maker.args[0].meta["val"].dim() else maker.args[1]
        if transposed:
            bare = insert(node, aten.transpose.int, bare, *operand.args[1:])
        user = next(iter(node.users))
        node.args = tuple(bare if i == position else a for i, a in enumerate(node.args))
        scaled = insert(user, aten.mul.Tensor, node, factor, value=node.meta["val"])
        user.replace_input_with(node, scaled)
        return True
    return False


def _merge_factors(node: fx.Node) -> bool:
    """(scores * a) * b -> scores * (a b)."""
    outer = constant_factor(node)
    inner = constant_factor(node.args[0]) if outer is not None else None
    if inner is None or not feeds_softmax(node) or len(node.args[0].users) != 1:
        return False
    scaled = node.args[0]
    if not isinstance(scaled.args[1], int | float):
        return False  # first it becomes a number
    node.target, node.args = aten.mul.Tensor, (scaled.args[0], inner * outer)
    return True


def _sum_from_difference(node: fx.Node) -> bool:
    """scores - bias -> scores + (-bias)."""
    if node.target is not aten.sub.Tensor or node.kwargs or not feeds_softmax(node):
        return False
    scores, bias = node.args
    if not isinstance(scores, fx.Node) or not isinstance(bias, fx.Node):
        return False
    if shape_of(scores) != shape_of(node) or _constant_along_last(bias):
        return False
    if bias.meta["val"].dim() and bias.meta["val"].dtype != node.meta["val"].dtype:
        bias = insert(node, aten.to.dtype, bias, node.meta["val"].dtype)  # -1 is no uint8
    node.target, node.args = aten.add.Tensor, (scores, insert(node, aten.neg.default, bias))
    return True


def _constant_along_last(x: fx.Node) -> bool:
    """Has it one entry per row, as a row's maximum has?"""
    return x.meta["val"].dim() > 0 and shape_of(x)[-1] == 1


def _softmax_of_shifted(node: fx.Node) -> bool:
    """softmax(x - max x) -> softmax(x), the maximum of each row, cast or not. Another number would
    do in real arithmetic, but not where it is so large that the scores vanish beside it."""
    if node.target is not aten.softmax.int or node.args[1] != -1:
        return False
    cast = node.args[0] if is_cast(node.args[0]) else None
    shifted = node.args[0] if cast is None else cast.args[0]
    if shifted.target is not aten.sub.Tensor or shifted.kwargs:
        return False
    x, m = shifted.args
    if not (isinstance(x, fx.Node) and isinstance(m, fx.Node) and _is_row_maximum(m, x)):
        return False
    same = shape_of(x) == shape_of(shifted) and x.meta["val"].dtype == shifted.meta["val"].dtype
    if not same or shape_of(x)[-1] == 1:
        return False
    if cast is not None:
        if not can_hold(cast.meta["val"].dtype, x.meta["val"].dtype):
            return False  # the maximum may be what keeps the scores within a narrow range
        x = insert(node, cast.target, x, *cast.args[1:], **cast.kwargs)
    node.args = (x, -1)
    return True


def _is_row_maximum(m: fx.Node, x: fx.Node) -> bool:
    """Is it amax(x, -1, keepdim=True) or max(x, -1, keepdim=True)[0]?"""
    if not _constant_along_last(m):
        return False
    while m.target is aten.detach.default:
        m = m.args[0]
    if m.target is operator.getitem and m.args[1] == 0:
        m = m.args[0]
        return m.target is aten.max.dim and m.args[0] is x
    return m.target is aten.amax.default and m.args[0] is x


def _softmax_between_views(node: fx.Node) -> bool:
    """unflatten(softmax(flatten(x))) -> softmax(x), rows kept whole."""
    softmax = node.args[0] if node.target in _UNFLATTEN else None
    if not isinstance(softmax, fx.Node) or softmax.target is not aten.softmax.int:
        return False
    flat = softmax.args[0]
    x = flat.args[0] if flat.target in _FLATTEN else None
    last = softmax.args[1] in (-1, softmax.meta["val"].dim() - 1) and len(softmax.args) == 2
    if not isinstance(x, fx.Node) or not last or shape_of(flat)[-1] != shape_of(x)[-1]:
        return False
    if shape_of(x) != shape_of(node) or len(softmax.users) != 1:
        return False
    node.target, node.args, node.kwargs = aten.softmax.int, (x, -1), {}
    return True


def _softmax_from_exponentials(node: fx.Node) -> bool:
    """e / sum(e) and e * (1 / sum(e)), e = exp(x), summed over the last dimension -> softmax(x)."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or node.kwargs:
        return False
    e, total = node.args
    if not (isinstance(e, fx.Node) and isinstance(total, fx.Node)):
        return False
    if node.target is aten.mul.Tensor:
        if total.target is not aten.reciprocal.default:
            return False
        total = total.args[0]
    if e.target is not aten.exp.default or total.target is not aten.sum.dim_IntList:
        return False
    rank = e.meta["val"].dim()
    last = total.args[0] is e and [d % rank for d in total.args[1]] == [rank - 1]
    kept = len(total.args) > 2 and total.args[2] is True and not total.kwargs
    if not (last and kept) or not e.args[0].meta["val"].is_floating_point():
        return False
    node.target, node.args = aten.softmax.int, (e.args[0], -1)
    return True


def _softmax_from_logarithm(node: fx.Node) -> bool:
    """exp(log_softmax(x)) and exp(x - logsumexp(x)) -> softmax(x)."""
    inner = node.args[0] if node.target is aten.exp.default else None
    if not isinstance(inner, fx.Node):
        return False
    rank = inner.meta["val"].dim()
    if inner.target is aten.log_softmax.int:
        x, dim = inner.args[:2]
        plain = len(inner.args) < 3 or inner.args[2] in (None, x.meta["val"].dtype)
        if not plain or dim % rank != rank - 1:
            return False
    elif inner.target is aten.sub.Tensor and not inner.kwargs:
        x, total = inner.args
        if not isinstance(total, fx.Node) or total.target is not aten.logsumexp.default:
            return False
        last = total.args[0] is x and [d % rank for d in total.args[1]] == [rank - 1]
        if not last or len(total.args) < 3 or total.args[2] is not True:
            return False
    else:
        return False
    node.target, node.args = aten.softmax.int, (x, -1)
    return True


def _additive_mask(node: fx.Node) -> bool:
    """masked_fill(s, m, f) and where(m, s, f) -> s + where(...), for a fill that absorbs any s.

    s must be a bare product: where it holds fills or masks already, two of them would add up to
    less than one, and a row that keeps nothing would no longer be uniform.
    """
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, condition, fill = node.args
        keeps = False
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        condition, scores, fill = node.args
        keeps = True
        if scalar_value(scores) is not None:  # the fill stands first
            scores, fill, keeps = fill, scores, False
    else:
        return False
    fill = scalar_value(fill)
    if fill is None or fill > ABSORBING or not feeds_softmax(node):
        return False
    if not isinstance(scores, fx.Node) or scalar_value(scores) is not None:
        return False  # a constant beside the fill is a mask already, not masked scores
    if scores.meta["val"].dtype != node.meta["val"].dtype or not is_product(scores):
        return False
    if any(user.target is node.target is aten.masked_fill.Scalar for user in node.users):
        return False  # two fills become one first
    keep = condition if keeps else insert(node, aten.logical_not.default, condition)
    zero = insert(node, aten.scalar_tensor.default, 0.0, dtype=scores.meta["val"].dtype)
    mask = insert(node, aten.where.ScalarOther, keep, zero, fill)
    node.target, node.args = aten.add.Tensor, (scores, mask)
    return True


def _one_fill(node: fx.Node) -> bool:
    """masked_fill(masked_fill(s, a, f), b, f) -> masked_fill(s, a | b, f)."""
    if node.target is not aten.masked_fill.Scalar:
        return False
    inner, second, fill = node.args
    if inner.target is not aten.masked_fill.Scalar or inner.args[2] != fill:
        return False
    scores, first, _ = inner.args
    both = insert(node, aten.logical_or.default, first, second)
    node.args = (scores, both, fill)
    return True


SCORES: tuple[Rule, ...] = (
    _drop_zero,
    _scale_by_multiplication,
    _hoist_scale,
    _merge_factors,
    _sum_from_difference,
    _softmax_between_views,
    _softmax_from_exponentials,
    _softmax_from_logarithm,
    _softmax_of_shifted,
    _one_fill,
    _additive_mask,
)
