"""Operations that keep tokens apart: the dimensions of a result from those of the operands.

Each rule takes what is known of the operands and a node, and gives the dimensions of the node's
value that are of tokens, or a sentence that says why it reads tokens which its part does not hold.
The law: `parts`.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ridgeline.ir.masks import closed_beyond
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import element, index_symbol, shape_of
from ridgeline.passes.parallel.along import ROWS, Along, Dims, Known, tensors
from ridgeline.passes.parallel.rows import COPIES, NORMS, argument, same_size

aten = torch.ops.aten
RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default),
)
MOVES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default)
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
APPENDS = (aten.cat.default, aten.index_copy.default)
_PIECES = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_OVER = (
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
    *(aten.var.correction, aten.std.correction, aten.softmax.int, aten._softmax.default),
)


def is_pointwise(node: fx.Node) -> bool:
    """Is each element of the result computed from those of the operands at its place?"""
    overload = isinstance(node.target, torch._ops.OpOverload)
    tagged = overload and torch.Tag.pointwise in node.target.tags
    return tagged or is_cast(node) or node.target in COPIES


def elementwise(known: Known, node: fx.Node) -> Dims | str:
    sizes, dims = shape_of(node), Dims()
    operands = [n for n in node.all_input_nodes if tensors(n)]
    for d, along in known.labels(operands, len(sizes)):
        first = dims.setdefault(d, along)
        if first.kind != along.kind or first.base != along.base:
            return _mixes(node)
        if first.state != along.state:
            dims[d] = replace(first, state="open")
    for operand in operands:
        if not known.fits(operand, sizes, dims):
            return f"{said(node)} reads {said(operand)}, whose tokens lie otherwise"
    if not (is_cast(node) or node.target in COPIES):
        dims = {d: replace(along, state="open") for d, along in dims.items()}
    return _masked(known, node, dims)


def _masked(known: Known, node: fx.Node, dims: Dims) -> Dims:
    """Scores to which a mask is added that closes what the part does not hold."""
    last = len(shape_of(node)) - 1
    scores = dims.get(last)
    if node.target is not aten.add.Tensor or scores is None or scores.kind != "keys":
        return dims
    masks = [n for n in node.all_input_nodes if known.own(n) is None]
    if dims.get(last - 1) == ROWS and len(masks) == 1 and not node.kwargs:
        known.open[node] = f"{said(node)} {closed_beyond(masks[0], scores.base)}"
        if not closed_beyond(masks[0], scores.base):
            dims[last] = replace(scores, state="closed")
    return dims


def linear(known: Known, node: fx.Node) -> Dims | str:
    x, *weights = node.args
    dims, last = known.own(x), len(shape_of(x)) - 1
    if dims is None or last in dims or not all(map(known.of_none, weights)):
        return f"{said(node)} sums over tokens"
    return dims


def product(known: Known, node: fx.Node) -> Dims | str:
    a, b = node.args[:2]
    rank = len(shape_of(node))
    left, right = known.from_right(a), known.from_right(b)
    if min(len(shape_of(a)), len(shape_of(b))) < 2:
        return f"{said(node)} multiplies vectors"
    if not all(known.own(n) is not None or known.of_none(n) for n in (a, b)):
        return _mixes(node)
    inner, other = left.pop(-1, None), right.pop(-2, None)
    weighed = inner is not None and other is not None and inner.state == "weights"
    if not ((inner is None and other is None) or (weighed and inner.kind == "keys")):
        return f"{said(node)} sums over tokens"
    dims = {d: along for d, along in (left | right).items() if d != -1}
    columns = right.get(-1)
    if columns is not None:
        dims[-1] = columns if -2 not in left else Along("keys", columns.base)
    if any(left[d] != right[d] for d in left.keys() & right.keys()):
        return _mixes(node)
    return {d + rank: along for d, along in dims.items()}


def attention(known: Known, node: fx.Node) -> Dims | str:
    query, keys = node.args[0], node.args[1:3]
    rows, read = known.from_right(query), [known.from_right(k) for k in keys]
    rank = len(shape_of(node))
    if -1 in rows or any(-1 in dims for dims in read):
        return f"{said(node)} sums over tokens"
    if -2 not in rows and rows and all(dims == rows for dims in read):  # sequences of a batch
        return {d + rank: along for d, along in rows.items()}
    if rows != {-2: ROWS} or not all(set(dims) == {-2} for dims in read):
        crosses = rows == {-2: ROWS} and all(map(known.of_none, keys))
        return {rank - 2: ROWS} if crosses else _mixes(node)
    base = read[0][-2].base
    if read[1][-2].base != base:
        return _mixes(node)
    reason = _reads_ahead(known, node, base)
    return f"{said(node)} {reason}" if reason else {rank - 2: ROWS}


def _reads_ahead(known: Known, node: fx.Node, base: sympy.Expr) -> str:
    """Why a row may read keys of tokens after it; "" where it is proven that none does."""
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal"):
        return ""  # j <= i, and base is not negative
    if mask is None:
        return "lets tokens read those after them"
    return closed_beyond(mask, base) if known.own(mask) is None else "has a mask of activations"


def over(known: Known, node: fx.Node) -> Dims | str:
    """A reduction, softmax or norm over dimensions that are not of tokens, or of weights."""
    dims, rank = known.own(node.args[0]), len(shape_of(node.args[0]))
    given = argument(node, 1, "dim")
    if node.target in NORMS:
        over = set(range(rank - len(given), rank))
    else:
        given = given if isinstance(given, list | tuple) else [given]
        over = {d % rank for d in given if d is not None} or set(range(rank))
    softmax = node.target in (aten.softmax.int, aten._softmax.default)
    if dims is None or any(known.own(n) is not None for n in node.all_input_nodes[1:]):
        return f"{said(node)} is not known to keep tokens apart"
    result = dict(dims)
    for d in over & dims.keys():
        if not (softmax and dims[d].kind == "keys" and dims[d].state == "closed"):
            return known.open.get(node.args[0], f"{said(node)} reads all tokens at once")
        result[d] = replace(dims[d], state="weights")
    if softmax or node.target in NORMS or argument(node, 2, "keepdim"):
        return result
    return {d - sum(o < d for o in over): along for d, along in result.items()}


def moved(known: Known, node: fx.Node) -> Dims | str:
    """A view: each dimension of tokens is one of the result's."""
    places: Dims = {}
    for dim, along in (known.own(node.args[0]) or {}).items():
        if (place := moved_to(node, dim)) is None:
            return f"{said(node)} joins or parts the tokens"
        places[place] = along
    return places


def piece(known: Known, node: fx.Node) -> Dims | str:
    """A slice, or pieces, along a dimension that is not of tokens."""
    dims, rank = known.own(node.args[0]) or {}, len(shape_of(node.args[0]))
    place = 2 if node.target in _PIECES else 1
    dim = (argument(node, place, "dim") or 0) % rank
    if dim in dims:
        return f"{said(node)} takes some tokens of all"
    if node.target is aten.select.int:
        return {d - (d > dim): along for d, along in dims.items()}
    return dims


def same(known: Known, node: fx.Node) -> Dims | str:
    """The same dimensions as what it reads."""
    return known.own(node.args[0]) or {}


def appended(known: Known, node: fx.Node) -> Dims | str:
    """cat: along the tokens they come after others, as in a cache; else side by side."""
    values = [v for v in node.args[0] if shape_of(v) != [0]]
    rank = len(shape_of(node))
    dim = (argument(node, 1, "dim") or 0) % rank
    owned = [v for v in values if known.own(v) is not None]
    if not any(dim in known.dims[v] for v in owned):
        sizes = shape_of(node)
        dims = {d: along for v in owned for d, along in known.dims[v].items()}
        fits = all(known.fits(v, sizes, dims) for v in values)
        fits = fits and all(known.dims[v] == dims for v in owned)
        return dims if fits else _mixes(node)
    if owned != values[-1:] or known.dims[owned[0]] != {dim: ROWS}:
        return _mixes(node)
    base = sum((shape_of(v)[dim] for v in values[:-1]), sympy.Integer(0))
    return {dim: Along("keys", base)}


def written(known: Known, node: fx.Node) -> Dims | str:
    """index_copy: tokens in their slots of a cache of fixed length, one after the other; sequences
    in rows of their own."""
    cache, dim, index, rows = node.args
    dim %= len(shape_of(cache))
    sequences = known.own(rows)
    if sequences and dim not in sequences and all(a == ROWS for a in sequences.values()):
        apart = known.of_none(index) and known.own(cache) in (None, sequences)
        return sequences if apart and known.fits(cache, shape_of(node), sequences) else _mixes(node)
    if known.own(rows) != {dim: ROWS} or any(known.own(n) is not None for n in (cache, index)):
        return _mixes(node)
    base = first_slot(index)
    if base is None:
        return f"{said(node)} writes to slots that are not known to follow one another"
    return {dim: Along("keys", base)}


def moved_to(node: fx.Node, dim: int) -> int | None:
    """The dimension of a view that is dimension `dim` of what it views; None where it is none."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if node.target is aten.permute.default:
        return [d % len(before) for d in node.args[1]].index(dim)
    if node.target is aten.transpose.int:
        a, b = (d % len(before) for d in node.args[1:3])
        return {a: b, b: a}.get(dim, dim)
    if node.target is aten.t.default:
        return len(before) - 1 - dim
    if node.target is aten.expand.default:
        return dim + len(after) - len(before)
    lead = sympy.prod(before[:dim])
    for d, size in enumerate(after):
        if same_size(size, before[dim]) and same_size(sympy.prod(after[:d]), lead):
            return d
    return None


def first_slot(index: fx.Node) -> sympy.Expr | None:
    """c where the index is c, c + 1, ...; of a start that only data says, 0, which it is not below:
    a slot below 0 is an error."""
    known = element(index)
    if known is None and index.target is aten.add.Tensor:
        steps, start = index.args
        if isinstance(start, fx.Node) and not shape_of(start) and element(steps) == index_symbol(0):
            return sympy.Integer(0)
    if known is None or not (known - index_symbol(0)).is_nonnegative:
        return None
    return known - index_symbol(0)


def _mixes(node: fx.Node) -> str:
    return f"{said(node)} reads tokens together with those that others read"


RULES: dict[Any, Callable[[Known, fx.Node], Dims | str]] = {
    ATTENTION: attention,
    aten.linear.default: linear,
    aten.cat.default: appended,
    aten.index_copy.default: written,
    aten.slice.Tensor: piece,
    aten.select.int: piece,
    operator.getitem: same,
    **dict.fromkeys(_PIECES, piece),
    **dict.fromkeys((*_OVER, *NORMS), over),
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys((*RESHAPES, *MOVES), moved),
}
