"""Rules that give matrix products one spelling: `matmul`, the first free dimension to the left.

Equal in real arithmetic: the terms of each sum stay, their order is the library's affair.
"""

import torch
from torch import fx

from ridgeline.ir.rules.common import Rule, copy_is_unseen, feeds_softmax, forward, insert, is_cast
from ridgeline.ir.symbolic import shape_of

aten = torch.ops.aten
_FLAT = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_WIDE = (aten.view.default, aten.reshape.default, aten.unflatten.int)


def _matmul_from_einsum(node: fx.Node) -> bool:
    """einsum of two operands with one summed letter -> matmul of permuted views."""
    if node.target is not aten.einsum.default or len(node.args) != 2 or node.kwargs:
        return False
    equation, operands = node.args
    if len(operands) != 2 or "->" not in equation:
        return False
    spelled = _letters(equation.replace(" ", ""), [o.meta["val"].dim() for o in operands])
    if spelled is None:
        return False
    left, right, out = spelled
    if any(len(set(s)) != len(s) for s in spelled):
        return False
    summed = [c for c in left if c in right and c not in out]
    batch = [c for c in out if c in left and c in right]
    first = [c for c in out if c in left and c not in right]
    second = [c for c in out if c in right and c not in left]
    whole = len(summed) == 1 and {*left, *right} == {*summed, *out}
    if not (whole and first and second):
        return False
    if len(second) > 1 or (len(first) == 1 and out.index(second[0]) < out.index(first[0])):
        operands, (left, right), (first, second) = operands[::-1], (right, left), (second, first)
    if len(second) != 1 or (len(first) != 1 and batch):
        return False
    a = _permuted(node, operands[0], left, [*batch, *first, *summed])
    b = _permuted(node, operands[1], right, [*batch, *summed, *second])
    product = insert(node, aten.matmul.default, a, b)
    result = _permuted(node, product, "".join([*batch, *first, *second]), list(out))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return True


def _letters(equation: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, an ellipsis written out."""
    inputs, out = equation.split("->")
    parts = inputs.split(",")
    extra = {r - len(p.replace("...", "")) for p, r in zip(parts, ranks, strict=True) if "..." in p}
    if len(extra) > 1:
        return None
    hidden = "".join(chr(ord("A") + i) for i in range(max(extra, default=0)))
    if set(hidden) & set(equation):
        return None
    left, right = (p.replace("...", hidden) for p in parts)
    return left, right, out.replace("...", hidden)


def _permuted(node: fx.Node, x: fx.Node, order: str, wanted: list[str]) -> fx.Node:
    """x with its dimensions, named by `order`, in the wanted order; a swap is a transpose.

    Of two ways that end in a transposed matrix the one is taken that keeps the memory's order
    before it: what transposes a key must be seen to do so.
    """
    dims = [order.index(c) for c in wanted]
    rank = len(dims)
    if dims == list(range(rank)):
        return x
    if dims[-2] > dims[-1]:
        straight = _permuted(node, x, order, [*wanted[:-2], wanted[-1], wanted[-2]])
        return insert(node, aten.transpose.int, straight, rank - 2, rank - 1)
    moved = [i for i, d in enumerate(dims) if i != d]
    if len(moved) == 2:
        return insert(node, aten.transpose.int, x, *moved)
    return insert(node, aten.permute.default, x, dims)


def _sum_from_baddbmm(node: fx.Node) -> bool:
    """baddbmm(s, a, b, beta, alpha) -> s * beta + a @ b * alpha."""
    if node.target is not aten.baddbmm.default:
        return False
    added, a, b = node.args
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if alpha != 1 and node.meta["val"].dtype == torch.float16:
        return False  # the product alone may be beyond fp16's range
    product = insert(node, aten.matmul.default, a, b)
    if alpha != 1:
        product = insert(node, aten.mul.Tensor, product, alpha)
    if beta == 0:  # what is not read may hold anything
        node.replace_all_uses_with(product)
        node.graph.erase_node(node)
        return True
    if beta != 1:
        added = insert(node, aten.mul.Tensor, added, beta)
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, added), {}
    return True


def _product_without_views(node: fx.Node) -> bool:
    """unflatten(flatten(a) @ flatten(b)) -> a @ b: batch and heads need not be one dimension."""
    product = node.args[0] if node.target in _WIDE else None
    if not isinstance(product, fx.Node) or product.target is not aten.matmul.default:
        return False
    a, b = (_unflattened(operand, product) for operand in product.args)
    if a is None or b is None or len(product.users) != 1:
        return False
    lead = shape_of(a)[:-2]
    rows, columns = shape_of(a)[-2], shape_of(b)[-1]
    if shape_of(b)[:-2] != lead or shape_of(node) != [*lead, rows, columns]:
        return False
    new = insert(product, aten.matmul.default, a, b)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _unflattened(node: fx.Node, before: fx.Node) -> fx.Node | None:
    """The four dimensions behind a value of three, through a transpose of its matrices."""
    if node.meta["val"].dim() != 3:
        return None
    if node.target is aten.transpose.int and node.args[1:] == (1, 2):
        inner = _unflattened(node.args[0], before)
        return None if inner is None else insert(before, aten.transpose.int, inner, 2, 3)
    source = node.args[0] if node.target in _FLAT else None
    if not isinstance(source, fx.Node) or source.meta["val"].dim() != 4:
        return None
    batch, heads, *matrix = shape_of(source)
    return source if shape_of(node) == [batch * heads, *matrix] else None


def _product_in_order(node: fx.Node) -> bool:
    """(a @ b) transposed -> b transposed @ a transposed, in attention."""
    product = node.args[0] if node.target is aten.transpose.int else None
    if not isinstance(product, fx.Node) or product.target is not aten.matmul.default:
        return False
    rank = node.meta["val"].dim()
    a, b = product.args
    whole = a.meta["val"].dim() == b.meta["val"].dim() == rank
    if node.args[1:] != (rank - 2, rank - 1) or len(product.users) != 1 or not whole:
        return False
    last = b.args[0] if b.target is aten.transpose.int else b
    while is_cast(last) or last.target is aten.slice.Tensor:
        last = last.args[0]
    if not (feeds_softmax(node) or last.target is aten.softmax.int):
        return False
    dims = (rank - 2, rank - 1)
    left, right = (insert(product, aten.transpose.int, x, *dims) for x in (b, a))
    node.target, node.args = aten.matmul.default, (left, right)
    return True


def _operand_uncopied(node: fx.Node) -> bool:
    """contiguous(x) -> x, where products of attention alone read it, which take any strides."""
    if node.target not in (aten.contiguous.default, aten.clone.default):
        return False
    readers = list(node.users)
    products = all(u.target is aten.matmul.default and _in_attention(u) for u in readers)
    return products and bool(readers) and copy_is_unseen(node) and forward(node)


def _in_attention(product: fx.Node) -> bool:
    """Does it make scores, or weigh values?"""
    weights = product.args[0]
    while is_cast(weights):
        weights = weights.args[0]
    return feeds_softmax(product) or weights.target is aten.softmax.int


PRODUCTS: tuple[Rule, ...] = (
    _operand_uncopied,
    _matmul_from_einsum,
    _sum_from_baddbmm,
    _product_without_views,
    _product_in_order,
)
