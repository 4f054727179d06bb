"""What each operation makes of a dimension that the ranks share out: its rule, by its name.

    on each index                 pointwise operations, casts, copies
    along a dimension             reductions, scans, sorts, slices, joins: along other ones
    a norm                        over the last dimensions, where the share is before them
    a product                     a dimension of its result, shared out as its operand's
      over the share of both      a partial sum, where one is a split weight
    attention                     heads are batches
    views                         `share_views`

An operation that has no rule here cannot be allowed.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.provenance import operation
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.layouts import VOCABULARY
from ridgeline.passes.parallel.rows import argument, same_size
from ridgeline.passes.parallel.share_products import PRODUCTS
from ridgeline.passes.parallel.share_views import VIEWS, Rule
from ridgeline.passes.parallel.shares import FILLS, Across, Share, Shares, pointwise, sees


def result_share(node: fx.Node, shares: Shares) -> Share | None:
    """The share of what `node`, which reads one, computes; None where it has none, as sums.

    Raises:
        Across: it reads what other ranks hold.
    """
    if node.target is operator.getitem:
        return shares.held[node.args[0]]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise Across("is not known to compute each index by itself")
    if node.target.namespace == "_c10d_functional":
        return None  # what is sent: `layouts` says what the ranks hold then
    name = node.target._opname.rstrip("_")
    rule = _RULES.get(name) if node.target.namespace == "aten" else None
    if pointwise(node) and (rule is None or node.target._overloadname == "other"):  # max(a, b)
        rule = _on_each
    if rule is None:
        raise Across("is not known to compute each index of a part by itself")
    share = rule(node, shares)
    if node.target._schema.is_mutable:
        _written(node, share, shares)
    return share


def _written(node: fx.Node, share: Share | None, shares: Shares) -> None:
    """What is written has the share from now on, by every name: of new memory and caches."""
    into = node.args[0]
    fresh = getattr(into.target, "_opname", "") in FILLS or into.op == "placeholder"
    other = into.op != "placeholder" and any(sees(x) and x < node for x in into.users)
    if into not in shares.held and (other or not fresh):
        raise Across("writes this rank's part to memory that has other names")
    if share is not None:
        shares.held[into] = share


def rank_of(node: fx.Node) -> int:
    value = node.meta["val"]
    while not isinstance(value, Tensor):
        value = value[0]
    return value.dim()


def _on_each(node: fx.Node, shares: Shares) -> Share | None:
    share = shares.alike(node.all_input_nodes, rank_of(node))
    if share is not None and shape_of(node)[share.dim] != _size(node, shares):
        raise Across("repeats this rank's part")
    return share


def _size(node: fx.Node, shares: Shares) -> Any:
    first = next(x for x in node.all_input_nodes if x in shares.held)
    return shape_of(first)[shares.held[first].dim]


def _filled(node: fx.Node, shares: Shares) -> Share | None:
    """zeros_like(x): shaped like x, the same for every index."""
    return replace(shares.held[node.args[0]], weight="")


def _dropout(node: fx.Node, shares: Shares) -> Share | None:
    if argument(node, 2, "train"):
        raise Across("draws random numbers for each index of a part")
    return shares.held[node.args[0]]


def _dims(node: fx.Node, rank: int) -> set[int]:
    """The dimensions that the operation goes along: all, where it names none."""
    for place, parameter in enumerate(node.target._schema.arguments):
        if parameter.name in ("dim", "dims", "axis"):
            given = argument(node, place, parameter.name)
            given = parameter.default_value if given is None else given
            dims = given if isinstance(given, list | tuple) else [given]
            return {d % rank for d in dims if d is not None} or set(range(rank))
    return set(range(rank))


def _along(node: fx.Node, shares: Shares) -> Share | None:
    """Goes along the dimensions that it names, index by index of all others."""
    operands = list(node.args[0]) if isinstance(node.args[0], list) else [node.args[0]]
    rank = max(map(rank_of, operands))
    operands = [x for x in operands if rank_of(x) == rank]  # an empty [0] may be joined to any
    beside = [x for x in node.all_input_nodes if x not in operands and "val" in x.meta]
    for x in beside:  # indices and values to be written
        if isinstance(x.meta["val"], Tensor) and rank_of(x) == rank:
            operands.append(x)
        elif x in shares.held:
            raise Across("takes indices from a part")
    share = shares.alike(operands, rank, fills=False)
    if share is None:
        raise Across("takes indices from a part")
    dims = _dims(node, rank)
    if share.dim in dims:
        return _along_the_share(node, share)
    gone = sum(d < share.dim for d in dims) if rank_of(node) < rank else 0
    return share.at(share.dim - gone)


def _stacked(node: fx.Node, shares: Shares) -> Share | None:
    rank = rank_of(node)
    share, new = shares.alike(node.args[0], rank - 1, fills=False), argument(node, 1, "dim") or 0
    return None if share is None else share.at(share.dim + (new % rank <= share.dim))


def _along_the_share(node: fx.Node, share: Share) -> Share:
    source = node.args[0]
    whole = shape_of(source)[share.dim] if isinstance(source, fx.Node) else None
    name = node.target._opname
    if name == "slice" and (node.args[2] or 0) == 0 and argument(node, 4, "step") in (None, 1):
        end = argument(node, 3, "end")
        if end is None or (isinstance(end, int) and whole.is_Integer and end >= whole):
            return share
    if name in ("split", "split_with_sizes", "chunk") and share.packed > 1:
        sizes = [v.shape[share.dim] for v in node.meta["val"]]
        if len(sizes) == share.packed and len(set(sizes)) == 1:
            return replace(share, packed=1)
    if name == "repeat_interleave" and _times(node) and share.outer == 1:
        times = _times(node)
        return replace(share, cuts=frozenset({times, *(c * times for c in share.cuts)}))
    raise Across(f"reads all indices together, as '{operation(node)}' does")


def _times(node: fx.Node) -> int:
    """How often each index is repeated; 0 where that differs, or the value is flattened before."""
    times = node.args[1] if len(node.args) > 1 else None
    return times if isinstance(times, int) and argument(node, 2, "dim") is not None else 0


def _norm(node: fx.Node, shares: Shares) -> Share | None:
    source, shape = node.args[0], node.args[1]
    share = shares.held.get(source)
    if share is None or any(x in shares.held for x in node.all_input_nodes if x is not source):
        raise Across("is a norm whose weight is a part")
    if share.dim >= rank_of(source) - len(shape):
        raise Across("normalises over all indices")
    return share


def _padded(node: fx.Node, shares: Shares) -> Share | None:
    if node.target._opname == "pad" and argument(node, 2, "mode") not in (None, "constant"):
        raise Across("pads with what it reads")
    share, pads = shares.held[node.args[0]], node.args[1]
    behind = rank_of(node) - 1 - share.dim
    if any(p != 0 for p in pads[2 * behind : 2 * behind + 2]):
        raise Across("shifts the indices")
    return replace(share, weight="")


def _indexed(node: fx.Node, shares: Shares) -> Share | None:
    """x[:, i, j]: the indexed dimensions give way to those of the indices."""
    share = shares.held.get(node.args[0])
    return _after_indices(node, share, rank_of(node), shares)


def _put(node: fx.Node, shares: Shares) -> Share | None:
    """x[:, i, j] = values, in x a cache or shared out as the values are."""
    into, indices, values = node.args[:3]
    at, rank = [d for d, i in enumerate(indices) if i is not None], rank_of(into)
    made = rank - len(at) + max(rank_of(indices[d]) for d in at)
    own = shares.held.get(into)
    if own is None:
        given = shares.held.get(values)
        if given is None or made != rank or rank_of(values) != rank:
            raise Across("writes a part to what is none")
        size = shape_of(values)[given.dim]
        if not shares.fits(into, given.dim - rank, size, given, fills=False):
            raise Across("writes a part to what is none")
        own = given
    placed = _after_indices(node, own, made, shares)
    value = shares.held.get(values)
    if value is None or placed is None or value.dim - rank_of(values) != placed.dim - made:
        raise Across("writes to a part what is none, or is shared out otherwise")
    alike = value.packed == own.packed and same_size(value.outer, own.outer)
    if not alike or not same_size(shape_of(values)[value.dim], shape_of(into)[own.dim]):
        raise Across("writes to a part what is shared out otherwise")
    return replace(own, cuts=own.cuts & value.cuts, weight="")


def _after_indices(node: fx.Node, share: Share | None, rank: int, shares: Shares) -> Share | None:
    """The share of x[indices], of that rank."""
    source, indices = node.args[:2]
    at = [d for d, i in enumerate(indices) if i is not None]
    if share is None or share.dim in at or any(indices[d] in shares.held for d in at):
        raise Across("takes some indices of a part, or indices from one")
    if any(indices[d].meta["val"].dtype == torch.bool for d in at):
        raise Across("takes what a mask selects")
    made = rank - rank_of(source) + len(at)
    if at != list(range(at[0], at[-1] + 1)):
        return share.at(share.dim - sum(d < share.dim for d in at) + made)
    return share.at(share.dim if share.dim < at[0] else share.dim - len(at) + made)


def _looked_up(node: fx.Node, shares: Shares) -> Share | None:
    """Rows of a part of the vocabulary, zeros for others' ids: a partial sum."""
    weight = shares.held.get(node.args[0])
    if weight is None or weight.weight != VOCABULARY or node.args[1] in shares.held:
        raise Across("looks up rows of a part, or by ids from one")
    return None


_ALONG = (
    *("mean", "sum", "prod", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"),
    *("amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "any", "all", "median"),
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"),
    *("sort", "argsort", "topk", "kthvalue", "flip", "roll", "glu", "cat"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
    *("gather", "index_select", "index_copy", "scatter", "slice_scatter", "repeat_interleave"),
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _norm),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _filled),
    **{"dropout": _dropout, "pad": _padded, "index": _indexed},
    **{"embedding": _looked_up, "index_put": _put, "constant_pad_nd": _padded},
    "stack": _stacked,
    **PRODUCTS,
    **VIEWS,
}
