"""Products and attention of values that the ranks share out, by the labels of their dimensions.

    matmul   [b, m, k] [b, k, n] -> [b, m, n]       linear   [b, k] [n, k] -> [b, n]

A share along b, m or n is one of the result, if the other operand that has the label is shared out
alike. Along k it is summed over: the ranks' results are parts of a sum, which `layouts` follows
where one operand is a split weight; elsewhere nothing would add them.
"""

import string
from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import fx

from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.layouts import ROW
from ridgeline.passes.parallel.rows import argument, same_size
from ridgeline.passes.parallel.shares import Across, Share, Shares

Labels = list[Hashable]


def contracted(
    shares: Shares, operands: Sequence[tuple[fx.Node, Labels]], result: Labels
) -> Share | None:
    """The share of a product of `operands` with labelled dimensions; None of a partial sum."""
    found = [(x, labels, shares.held[x]) for x, labels in operands if x in shares.held]
    first, labels, share = found[0]
    label, size = labels[share.dim], shape_of(first)[share.dim]
    if any(own[s.dim] != label or s.packed != share.packed for _, own, s in found):
        raise Across("multiplies values that are shared out along different dimensions")
    if any(not same_size(s.outer, share.outer) for _, _, s in found):
        raise Across("multiplies values whose shares lie in other orders")
    if label not in result:
        if sorted(s.weight for _, _, s in found) == ["", ROW]:
            return None
        raise Across("adds up over this rank's indices alone")
    for x, own in operands:
        if label in own and x not in shares.held:
            from_right = own.index(label) - len(own)
            if not shares.fits(x, from_right, size, share, fills=True):
                raise Across("multiplies with a value, which is no part, for each index of a part")
    cuts = frozenset.intersection(*(s.cuts for _, _, s in found))
    return replace(share, dim=result.index(label), cuts=cuts, weight="")


def _batches(count: int) -> Labels:
    return [("batch", i) for i in reversed(range(count))]


def _of_matmul(a: fx.Node, b: fx.Node) -> tuple[Labels, Labels, Labels]:
    p, q = len(shape_of(a)), len(shape_of(b))
    left: Labels = [*_batches(p - 2), "m", "k"][-max(p, 1) :] if p > 1 else ["k"]
    right: Labels = [*_batches(q - 2), "k", "n"] if q > 1 else ["k"]
    made = _batches(max(p, q, 2) - 2)
    made += [x for x in ("m", "n") if x in left or x in right]
    return left, right, made


def _matmul(node: fx.Node, shares: Shares) -> Share | None:
    a, b = node.args[:2]
    left, right, made = _of_matmul(a, b)
    return contracted(shares, [(a, left), (b, right)], made)


def _addmm(node: fx.Node, shares: Shares) -> Share | None:
    bias, a, b = node.args[:3]
    left, right, made = _of_matmul(a, b)
    rank = len(shape_of(bias))
    return contracted(shares, [(a, left), (b, right), (bias, made[-rank:])], made)


def _linear(node: fx.Node, shares: Shares) -> Share | None:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    batches = _batches(len(shape_of(x)) - 1)
    operands: list[tuple[fx.Node, Labels]] = [(x, [*batches, "k"]), (weight, ["n", "k"])]
    if bias is not None:
        operands.append((bias, ["n"]))
    return contracted(shares, operands, [*batches, "n"])


def _einsum(node: fx.Node, shares: Shares) -> Share | None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    given, arrow, result = equation.partition("->")
    if not arrow or "..." in equation or not set(equation) <= {*string.ascii_letters, *",->"}:
        raise Across("is an einsum whose dimensions are not all named")
    labelled = [(x, list(own)) for x, own in zip(operands, given.split(","), strict=True)]
    if any(len(set(own)) < len(own) for _, own in labelled):
        raise Across("reads a diagonal")
    return contracted(shares, labelled, list(result))


def _attention(node: fx.Node, shares: Shares) -> Share | None:
    """Heads of queries, keys and values are this rank's, with a group of queries for each key."""
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    if argument(node, 4, "dropout_p") not in (None, 0.0):
        raise Across("draws random numbers for each index of a part")
    share = shares.held.get(query)
    if share is None or share.dim > len(shape_of(query)) - 3:
        raise Across("attends over the channels of a part, or with queries that are no part")
    from_right = share.dim - len(shape_of(query))
    for x in (key, value):
        size, other = shape_of(x)[from_right], shares.held.get(x)
        if other is None and not shares.fits(x, from_right, size, share, fills=False):
            raise Across("attends to keys or values that are no part")
        if other is not None and other.dim - len(shape_of(x)) != from_right:
            raise Across("attends to keys or values that are shared out otherwise")
        if other is not None and (other.outer != 1 or other.packed != 1):
            raise Across("attends to keys or values whose heads lie in another order")
    if share.outer != 1 and shape_of(key)[from_right] != shape_of(query)[from_right]:
        raise Across("attends with heads that lie in another order")
    if isinstance(mask, fx.Node):
        shares.alike([query, mask], len(shape_of(query)))
    return replace(share, weight="")


PRODUCTS = {
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **{"linear": _linear, "einsum": _einsum, "scaled_dot_product_attention": _attention},
}
