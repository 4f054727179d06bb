"""Rules that make all that is added to attention scores one bias: softmax(c s + b).

    (s + a) + b              =  s + (a + b)
    (s + a) c                =  s c + a c
    masked_fill(s + a, m, f) =  s + where(m, f, a)         f absorbs any score: s + f = f
    unflatten(s + a)         =  unflatten(s) + unflatten(a),   unflatten(s c) = unflatten(s) c
    max(s + a, m)            =  s + a                      a is 0 or finite and m the least number

s is a product of queries and keys, whatever its scale; a and b broadcast to it. Position biases
(T5, MPNet, ALiBi), masks added after them, and scores kept in three dimensions (BLOOM, DeBERTa)
all end as one product, one factor and one sum.
"""

import math

import torch
from torch import fx

from ridgeline.ir.masks import ABSORBING, scalar_value
from ridgeline.ir.rules.common import (
    Rule,
    constant_factor,
    feeds_softmax,
    insert,
    is_cast,
    is_tensor,
)
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_UNFLATTEN = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_STEPS = (*_UNFLATTEN, aten.flatten.using_ints, aten.tanh.default)
_PRODUCTS = (aten.matmul.default, aten.einsum.default, aten.baddbmm.default)


def is_product(scores: fx.Node) -> bool:
    """A product of matrices, scaled, capped, cast or viewed, and nothing added to it."""
    while constant_factor(scores) is not None or is_cast(scores) or scores.target in _STEPS:
        scores = next(a for a in scores.args if isinstance(a, fx.Node) and a.meta["val"].dim())
    return scores.target in _PRODUCTS


def biased(node: object) -> tuple[fx.Node, fx.Node] | None:
    """(s, a) where the node is s + a, of one dtype and the shape of s, and is read once."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    if len(node.users) != 1:
        return None
    dtype = node.meta["val"].dtype
    for s, a in (node.args, node.args[::-1]):
        if not (isinstance(s, fx.Node) and isinstance(a, fx.Node)):
            return None
        same = s.meta["val"].dtype == a.meta["val"].dtype == dtype and shape_of(s) == shape_of(node)
        if same and a.meta["val"].dim() and is_product(s):
            return s, a
    return None


def _bias_of_one_dtype(node: fx.Node) -> bool:
    """s + a -> s + a.to(dtype of the sum), in which torch adds them: a narrower bias would round
    what is added to it or scaled with it. (Integers stay: they are seldom meant as numbers.)"""
    if node.target is not aten.add.Tensor or node.kwargs or not feeds_softmax(node):
        return False
    dtype = node.meta["val"].dtype
    for position, a in enumerate(node.args):
        other = node.args[1 - position]
        if not is_tensor(a) or not is_tensor(other) or other.meta["val"].dtype != dtype:
            continue
        own = a.meta["val"]
        narrow = own.is_floating_point() and own.dtype != dtype
        if own.dim() and narrow and not is_product(a):
            wide = insert(node, aten.to.dtype, a, dtype)
            node.args = (wide, other) if position == 0 else (other, wide)
            return True
    return False


def _one_bias(node: fx.Node) -> bool:
    """(s + a) + b -> s + (a + b); layers that add the same two share their sum."""
    if node.target is not aten.add.Tensor or node.kwargs or not feeds_softmax(node):
        return False
    for inner, b in (node.args, node.args[::-1]):
        split = biased(inner)
        if split is None or not isinstance(b, fx.Node) or not _same_kind(inner, node):
            continue
        if b.meta["val"].dtype != node.meta["val"].dtype:
            continue
        s, a = split
        known = (
            u for u in a.users if u.target is aten.add.Tensor and u.args == (a, b) and u < node
        )
        both = next((u for u in known if not u.kwargs), None)
        node.args = (s, both or insert(node, aten.add.Tensor, a, b))
        return True
    return False


def _scale_under_bias(node: fx.Node) -> bool:
    """(s + a) * c -> s * c + a * c, c a number."""
    if node.target is not aten.mul.Tensor or node.kwargs or not feeds_softmax(node):
        return False
    inner, c = node.args
    split = biased(inner)
    if split is None or isinstance(c, fx.Node) or node.meta["val"].dtype == torch.float16:
        return False  # the scale may be what keeps a sum within fp16's range
    s, a = split
    scaled = insert(node, aten.mul.Tensor, s, c)
    node.target, node.args = aten.add.Tensor, (scaled, _scaled(node, a, c))
    return True


def _scaled(node: fx.Node, a: fx.Node, c: float) -> fx.Node:
    """a * c; a mask of 0 and a fill that absorbs either way stays what it is, to be proven."""
    if a.target is aten.where.ScalarOther and scalar_value(a.args[1]) == 0:
        fill = scalar_value(a.args[2])
        if fill is not None and c > 0 and max(fill, fill * c) <= ABSORBING:
            return a
    return insert(node, aten.mul.Tensor, a, c)


def _fill_under_bias(node: fx.Node) -> bool:
    """masked_fill(s + a, m, f) and where(~m, s + a, f) -> s + where(m, f, a)."""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        inner, condition, fill = node.args
        keeps = False
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        condition, inner, fill = node.args
        keeps = True
    else:
        return False
    fill = scalar_value(fill)
    if fill is None or fill > ABSORBING or not feeds_softmax(node):
        return False
    split = biased(inner)
    if split is None or not _same_kind(inner, node):
        return False
    s, a = split
    if keeps:
        bias = insert(node, aten.where.ScalarOther, condition, a, fill)
    else:
        bias = insert(node, aten.where.ScalarSelf, condition, fill, a)
    node.target, node.args = aten.add.Tensor, (s, bias)
    return True


def _floor_of_finite(node: fx.Node) -> bool:
    """max(s + mask, the least finite number) -> s + mask, for a mask of 0 and a finite fill."""
    if node.target is not aten.maximum.default and node.target is not aten.max.other:
        return False
    inner, floor = node.args
    split, least = biased(inner), scalar_value(floor)
    if split is None or least is None or not feeds_softmax(node) or not _same_kind(inner, node):
        return False
    _, mask = split
    while is_cast(mask):  # to the dtype of the sum, which holds every number of its own
        mask = mask.args[0]
    if mask.target not in (aten.where.Scalar, aten.where.ScalarOther, aten.where.self):
        return False
    kept, fill = (scalar_value(x) for x in mask.args[1:])
    finite = kept == 0 and fill is not None and math.isfinite(fill)
    if not finite or least > torch.finfo(node.meta["val"].dtype).min:
        return False
    node.replace_all_uses_with(inner)
    node.graph.erase_node(node)
    return True


def _unflattened_sum(node: fx.Node) -> bool:
    """unflatten(s + a) -> unflatten(s) + unflatten(a), batch and heads apart."""
    if not _unflattens(node) or not feeds_softmax(node):
        return False
    split = biased(node.args[0])
    if split is None:
        return False
    s, a = split
    if a.meta["val"].dim() == 3 and shape_of(a)[0] != 1:
        if shape_of(a)[0] != shape_of(s)[0]:
            return False
        a = _unflatten(node, a)
    wide = insert(node, node.target, s, *node.args[1:])
    node.target, node.args = aten.add.Tensor, (wide, a)
    return True


def _unflatten(node: fx.Node, a: fx.Node) -> fx.Node:
    """The view `node` of a bias, whose matrices may be broadcast."""
    if node.target is aten.unflatten.int:
        return insert(node, node.target, a, *node.args[1:])
    matrix = [1 if shape_of(a)[d] == 1 else node.args[1][d + 1] for d in (1, 2)]
    return insert(node, aten.view.default, a, [*node.args[1][:2], *matrix])


def _unflattened_scale(node: fx.Node) -> bool:
    """unflatten(s * c) -> unflatten(s) * c, c a number."""
    if not _unflattens(node) or not feeds_softmax(node):
        return False
    scaled = node.args[0]
    if scaled.target is not aten.mul.Tensor or constant_factor(scaled) is None:
        return False
    s, c = scaled.args
    if isinstance(c, fx.Node) or len(scaled.users) != 1:
        return False
    wide = insert(node, node.target, s, *node.args[1:])
    node.target, node.args = aten.mul.Tensor, (wide, c)
    return True


def _unflattens(node: fx.Node) -> bool:
    """Does it open [batch * heads, rows, columns] to four dimensions?"""
    if node.target not in _UNFLATTEN:
        return False
    before, after = shape_of(node.args[0]), shape_of(node)
    return len(before) == 3 and len(after) == 4 and before[1:] == after[2:]


def _same_kind(inner: fx.Node, node: fx.Node) -> bool:
    """One shape and dtype: nothing was widened on the way."""
    same = inner.meta["val"].dtype == node.meta["val"].dtype
    return same and shape_of(inner) == shape_of(node)


BIASES: tuple[Rule, ...] = (
    _bias_of_one_dtype,
    _one_bias,
    _floor_of_finite,
    _scale_under_bias,
    _fill_under_bias,
    _unflattened_sum,
    _unflattened_scale,
)
